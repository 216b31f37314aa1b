from apr_jax.tokenizers.byte_level import BYTE_TOKENIZER_FILE as BYTE_TOKENIZER_FILE
from apr_jax.tokenizers.byte_level import ByteTokenizer as ByteTokenizer
from apr_jax.tokenizers.files import TOKENIZER_FILES as TOKENIZER_FILES
from apr_jax.tokenizers.files import has_tokenizer as has_tokenizer
from apr_jax.tokenizers.files import load_tokenizer as load_tokenizer
from apr_jax.tokenizers.hugging_face import HuggingFaceTokenizer as HuggingFaceTokenizer
from apr_jax.tokenizers.interface import Tokenizer as Tokenizer
from apr_jax.tokenizers.sentencepiece_model import SentencePieceTokenizer as SentencePieceTokenizer

"""Initial weights that make a skill easy to find."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.params import build_decoder, named_params
from apr_jax.tasks.countdown_vocabulary import BOS, EOS
from apr_jax.tokenizers import Tokenizer


def _core(piece: str) -> str:
    """A piece without the spaces and signs around it; a piece of signs alone keeps them."""
    return piece.strip(" ,=:[") or piece.strip(" ")


def tie_matching_heads(decoder: Decoder) -> None:
    """Starts the first query head of every group from its key head's weights; changes the decoder in place.

    Such a head attends to tokens like its own, so that "this value occurred before" is visible from the first step.
    From random weights a small model does not find it within two thousand steps. All of it is trained.
    """
    config = decoder.config
    for layer in decoder.layers:
        queries, keys = np.array(layer.attention.q.kernel[...]), np.array(layer.attention.k.kernel[...])
        heads = queries.reshape(config.d_model, config.num_kv_heads, config.group_size, config.head_dim)
        heads[:, :, 0] = keys.reshape(config.d_model, config.num_kv_heads, config.head_dim)
        layer.attention.q.kernel[...] = jnp.asarray(heads.reshape(queries.shape))


def pieces_of(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """The text of every token; of those that begin and end a text, which decode to nothing, the name."""
    pieces = [tokenizer.decode([i]) for i in range(config.vocab_size)]
    if config.bos_id is not None:
        pieces[config.bos_id] = BOS
    for i in config.eos_ids:
        pieces[i] = EOS
    return pieces


def take_over(decoder: Decoder, source: Decoder, source_pieces: Sequence[str], pieces: Sequence[str]) -> Decoder:
    """A decoder that knows what a source with another vocabulary knows.

    A piece's embedding is the source's of the same piece, or of the piece that differs by the spaces and signs around
    it only; one that the source has not keeps the decoder's own, at the mean length of the others.

    Raises:
      ValueError: the two differ in more than the vocabulary, or an embedding is not tied.
    """
    values, taken = named_params(decoder), named_params(source)
    for name, value in values.items():
        if name != "embedding" and (name not in taken or taken[name].shape != value.shape):
            found = taken[name].shape if name in taken else None
            raise ValueError(f"{name} is {found} in the source, must be {value.shape}")
    mine, theirs = np.array(values["embedding"]), np.asarray(taken["embedding"])
    by_text = {_core(piece): i for i, piece in enumerate(source_pieces)}
    by_text |= {piece: i for i, piece in enumerate(source_pieces)}
    length = np.linalg.norm(theirs, axis=1).mean()
    mine *= length / np.linalg.norm(mine, axis=1, keepdims=True)
    for i, piece in enumerate(pieces):
        if (found := by_text.get(piece, by_text.get(_core(piece)))) is not None:
            mine[i] = theirs[found]
    return build_decoder(decoder.config, decoder.dtype, {**taken, "embedding": jnp.asarray(mine)}.__getitem__)

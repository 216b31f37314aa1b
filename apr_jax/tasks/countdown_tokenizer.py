"""The sentencepiece model of the Countdown format: one token a piece, built from the list of pieces."""

from sentencepiece import sentencepiece_model_pb2

from apr_jax.tasks.countdown_vocabulary import BARE_NUMBERS, BOS, CALLS, EOS, MODES, PAD, TAGS, UNK, vocabulary


def build_sentencepiece_model() -> bytes:
    """The serialized model; the same bytes on every call.

    A text has the segmentation of fewest pieces; of ` 34` `5` and ` 3` `45` the first, as the bare `45` weighs more.
    """
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
    kinds = model.SentencePiece
    special = {UNK: kinds.UNKNOWN, BOS: kinds.CONTROL, EOS: kinds.CONTROL, PAD: kinds.CONTROL}
    special |= dict.fromkeys((*MODES.values(), *TAGS, *CALLS), kinds.USER_DEFINED)
    for piece in vocabulary():
        entry = model.pieces.add()
        entry.piece = piece.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
        entry.type = special.get(piece, kinds.NORMAL)
        entry.score = 0.0 if piece in special else -1.01 if piece in BARE_NUMBERS[10:] else -1.0
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.unk_piece = vocabulary().index(UNK), UNK
    trainer.bos_id, trainer.bos_piece = vocabulary().index(BOS), BOS
    trainer.eos_id, trainer.eos_piece = vocabulary().index(EOS), EOS
    trainer.pad_id, trainer.pad_piece = vocabulary().index(PAD), PAD
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)

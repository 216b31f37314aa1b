"""What the recipe adds to plain traces: drills, matching heads, a heavier loss on rare tokens, decoding."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.output import GenerateError
from apr_jax.tasks.countdown import Problem, check_equations, parse_equations
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import quad
from apr_jax.tasks.countdown_task import HELD_OUT_SEED, TASKS
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model
from apr_jax.tasks.countdown_vocabulary import MATCH, number_pieces, vocabulary
from apr_jax.tasks.trace import Block, Span, trace_text
from apr_jax.tokenizers import SentencePieceTokenizer
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS, CountdownSamples, Curriculum
from apr_jax.train.countdown_drills import NUM_ROUNDS, NUM_STATES, draw_answers, draw_nodes, draw_rounds
from apr_jax.train.decoded import decoded
from apr_jax.train.initialization import pieces_of, take_over, tie_matching_heads
from apr_jax.train.packing import flatten, pack, stack
from apr_jax.train.supervised import mean_loss

CONFIG = ModelConfig(
    vocab_size=len(vocabulary()), d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    max_position=2048, tie_embeddings=True, bos_id=1, eos_ids=(2,),
)  # fmt: skip


def test_drills_hold_right_quads_and_marks():
    matches, rounds = 0, 0
    for seed in range(30):
        pieces = [p for span in draw_rounds(np.random.default_rng(seed)) if isinstance(span, Span) for p in span.pieces]
        body = "".join(pieces[3:])
        for text in body.removesuffix(" ,").split(" ,"):
            made, needed = text.split(" |")
            x, y, *made_slots = made.replace(" =", "").split()
            needed, nearest = needed.replace(MATCH, "").split(" ~")
            target, number, *needed_slots = needed.replace(" =", "").split()
            expected_made, expected = quad(int(x), int(y)), quad(int(target), int(number))
            assert [f" {slot}" for slot in made_slots] == [number_pieces(v)[0] for v in expected_made]
            assert [f" {slot}" for slot in needed_slots] == [number_pieces(v)[0] for v in expected]
            hit = next((i for i, v in enumerate(expected) if v is not None and v in expected_made), None)
            made_values = [v for v in expected_made if v is not None]
            closest = [None if v is None else min(made_values, key=lambda m: abs(m - v)) for v in expected]
            assert nearest.split() == [number_pieces(v)[0].strip() for v in closest[: 4 if hit is None else hit + 1]]
            assert text.endswith(MATCH) == (hit is not None)
            matches, rounds = matches + (hit is not None), rounds + 1
    assert rounds == 30 * NUM_ROUNDS and 0.4 < matches / rounds < 0.65


def test_drills_hold_the_nodes_of_apr_and_only_what_is_given_is_free():
    for seed in range(20):
        spans = [span for span in draw_nodes(np.random.default_rng(seed)) if isinstance(span, Span)]
        text, learned = "", ""
        for span in spans:
            text += "".join(span.pieces)
            learned += "".join(span.pieces[span.forced :])
        states = text.split("Moving to Node #0")[1:]
        assert len(states) == NUM_STATES
        for state in states:
            target, listed = re.findall(r"Current State: (\d+):\[([\d, ]+)\]", state)[0]
            given = sorted(map(int, listed.split(",")))
            nodes = re.findall(r"Node #0,(\d+): (\d+):\[([\d, ]+)\] Operation: (\d+)([-+*/])(\d+)=(\d+)\n", state)
            assert [int(node[0]) for node in nodes] == list(range(len(nodes))) and len(nodes) >= 5
            assert len({node[2:] for node in nodes}) == len(nodes)
            for _, goal, left, x, operator, y, value in nodes:
                *kept, made = map(int, left.split(","))
                assert goal == target and made == int(value) == eval(f"{x}{operator}{y}")
                assert sorted([*kept, int(x), int(y)]) == given
        assert "Current State" not in learned and learned.count("Operation: ") == text.count("Operation: ")


def test_drills_of_answers_learn_only_what_solves():
    found, blocks = collections.Counter(), []
    for seed in range(40):
        problem = None
        for trace in draw_answers(np.random.default_rng(seed)):
            text = trace_text(trace)
            given = re.search(r"> ([\d ]+) -> (\d+)|Node #0\nCurrent State: (\d+):\[([\d, ]+)\]", text)
            if given:  # a search of APR's does not say where it began: it follows its root
                numbers, target = (given[1], given[2]) if given[1] else (given[4].replace(",", ""), given[3])
                problem = Problem(tuple(map(int, numbers.split())), int(target))
            for (span,) in [b for part in trace for b in (part.branches if isinstance(part, Block) else [(part,)])]:
                learned = "".join(span.pieces[span.forced :])
                for answer in re.findall(r"(?:=>(?:\d:)?|Operations:)((?: \d+ ?[-+*/] ?\d+ ?= ?\d+ ?,?)+)", learned):
                    equations = parse_equations(answer)
                    assert problem is not None and equations is not None
                    assert check_equations(problem, equations) is None
                    found[re.search("sequential|multiverse|npr|threadweaver|Moving", text)[0]] += 1
                assert "|" not in learned
            if len(trace) == 3:
                blocks.append(text)
    assert len(found) == 5 and min(found.values()) > 10
    firsts = []
    for text in blocks:
        # A branch is headed by the label that its conclusion repeats; the parent names the first that matched.
        branches = re.findall(r"(\d:) \d[^<]*? =>(?:(\d:)| none)", text)
        assert [label for label, _ in branches] == [f"{i + 1}:" for i in range(len(branches))]
        assert all(again in ("", label) for label, again in branches)
        firsts.append(next(again for _, again in branches if again))
        assert re.search(r"<(?:Conclusion|takeaway)>\n?(\d:)", text)[1] == firsts[-1]
    assert len(set(firsts)) > 2, "not always the first branch"


def test_drills_leave_held_out_problems_out():
    text = trace_text(draw_nodes(np.random.default_rng(0)))
    target, numbers = re.findall(r"Current State: (\d+):\[([\d, ]+)\]", text)[3]
    problem = Problem(tuple(map(int, numbers.split(","))), int(target))
    without = trace_text(draw_nodes(np.random.default_rng(0), {problem}))
    assert f"{target}:[{numbers}], Operations: []" in text and f"{target}:[{numbers}], Operations: []" not in without
    assert without.count("Moving to Node") >= NUM_STATES - 1

    def problems(traces):
        found = [re.search(r"> ([\d ]+) -> (\d+)", trace_text(trace)) for trace in traces]
        return {Problem(tuple(map(int, each[1].split())), int(each[2])) for each in found if each}

    drawn = problems(draw_answers(np.random.default_rng(0)))
    assert drawn and not drawn & problems(draw_answers(np.random.default_rng(0), drawn))


def test_drills_give_operands_and_teach_the_rest():
    (row,) = flatten(draw_rounds(np.random.default_rng(0)), PIECE_IDS.__getitem__)
    learned = row.tokens[1:][row.loss[:-1] > 0]
    assert PIECE_IDS[MATCH] in learned and PIECE_IDS[" ="] not in learned
    assert PIECE_IDS[" |"] in learned and PIECE_IDS[" ~"] in learned
    assert 0.4 < row.loss.mean() < 0.8


def test_sizes_and_targets_are_drawn_by_their_shares():
    samples = CountdownSamples(sizes=(0.3, 0.3, 0.2, 0.2), large_share=0.5, shares=(1.0, 0.0, 0.0, 0.0, 1.0))
    seen = {"sequential": set(), "apr": set()}
    for i in range(150):
        for row in samples(i)[:1]:
            text = "".join(vocabulary()[token] for token in row.tokens)
            if found := re.match(r"<bos><sequential> ([\d ]+) -> (\d+)", text):
                seen["sequential"].add((len(found[1].split()), int(found[2]) > 100))
            else:
                found = re.search(r"Current State: (\d+):\[([\d, ]+)\]", text)
                seen["apr"].add((len(found[2].split(", ")), int(found[1]) > 100))
    assert seen["sequential"] == {(size, large) for size in (3, 4, 5, 6) for large in (False, True)}
    assert seen["apr"] == {(size, False) for size in (3, 4, 5, 6)}
    with pytest.raises(ValueError, match=r"sizes are .* must be 4 numbers"):
        CountdownSamples(sizes=(1.0,))


def test_settings_change_where_a_stage_begins():
    samples = Curriculum.of({"drill_shares": (1.0, 0.0, 0.0)}, [(6, {"drill_share": 1.0}), (9, {"drill_share": 0.0})])
    drills = [row for i in range(6, 9) for row in samples(i)]
    assert len(drills) == 3 and all(row.tokens[2] == PIECE_IDS[" ,"] for row in drills)
    for others in (range(6), range(9, 15)):
        rows = [row for i in others for row in samples(i)]
        assert rows and all(row.tokens[2] != PIECE_IDS[" ,"] for row in rows)
    with pytest.raises(ValueError, match=r"stages begin at samples \[0, 6, 6\], must ascend"):
        Curriculum.of({}, [(6, {}), (6, {})])


def test_every_kind_of_drill_is_drawn():
    for kind, piece in enumerate((" ~", "\nGenerated Node #0,1: ", " =>")):
        shares = tuple(float(i == kind) for i in range(3))
        rows = CountdownSamples(drill_share=1.0, drill_shares=shares)(0)
        assert any(PIECE_IDS[piece] in row.tokens[1:][row.loss[:-1] > 0] for row in rows), piece


def test_matching_heads_start_from_their_keys():
    decoder, plain = Decoder(CONFIG, rngs=nnx.Rngs(0)), Decoder(CONFIG, rngs=nnx.Rngs(0))
    tie_matching_heads(decoder)
    for layer, before in zip(decoder.layers, plain.layers, strict=True):
        q, k, old = (x[...] for x in (layer.attention.q.kernel, layer.attention.k.kernel, before.attention.q.kernel))
        np.testing.assert_array_equal(q[:, 0:8], k[:, 0:8])
        np.testing.assert_array_equal(q[:, 16:24], k[:, 8:16])
        np.testing.assert_array_equal(q[:, 8:16], old[:, 8:16])
        np.testing.assert_array_equal(q[:, 24:32], old[:, 24:32])
        assert not np.array_equal(q[:, 0:8], old[:, 0:8])


def test_weights_change_the_gradient_and_not_the_reported_loss():
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    (row,) = flatten(draw_rounds(np.random.default_rng(1)), PIECE_IDS.__getitem__)
    batch = {256: stack(pack([row], [256], PAD_ID)[256])}

    def gradient(weights):
        def objective(params):
            return mean_loss(nnx.merge(graphdef, params), batch, weights)

        gradients, metrics = jax.grad(objective, has_aux=True)(params)
        return gradients, float(metrics["loss"])

    none, loss = gradient(None)
    ones, same_loss = gradient(jnp.ones(CONFIG.vocab_size))
    only_matches, masked_loss = gradient(jnp.zeros(CONFIG.vocab_size).at[PIECE_IDS[MATCH]].set(1.0))
    others, _ = gradient(jnp.ones(CONFIG.vocab_size).at[PIECE_IDS[MATCH]].set(0.0))
    assert loss == same_loss == masked_loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), none, ones)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(only_matches)) > 1e-4
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, atol=1e-6), none, only_matches, others)


def test_pieces_of_a_checkpoint_are_its_vocabulary(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(build_sentencepiece_model())
    pieces = pieces_of(SentencePieceTokenizer(tmp_path / "tokenizer.model"), CONFIG)
    assert len(pieces) == len(vocabulary())
    assert {piece for piece, ours in zip(pieces, vocabulary(), strict=True) if piece != ours} <= {""}
    assert (pieces[1], pieces[2]) == ("<bos>", "<eos>") and pieces.count("") <= 1  # padding


def test_a_source_is_taken_over_piece_by_piece():
    pieces = vocabulary()
    old = ("<unk>", " 7", " =", "<Path>", "only there")
    source = Decoder(dataclasses.replace(CONFIG, vocab_size=len(old)), rngs=nnx.Rngs(3))
    plain = Decoder(CONFIG, rngs=nnx.Rngs(4))
    taken = take_over(plain, source, old, pieces)
    theirs, ours, fresh = (np.asarray(d.embedding[...]) for d in (source, taken, plain))
    for piece, found in ((" 7", 1), ("7", 1), ("=7", 1), (", 7", 1), ("7:[", 1), (" =", 2), ("<Path>", 3)):
        np.testing.assert_array_equal(ours[pieces.index(piece)], theirs[found])
    for other in (pieces.index(piece) for piece in ("\n :", " ,", " 8")):
        cosine = ours[other] @ fresh[other] / np.linalg.norm(ours[other]) / np.linalg.norm(fresh[other])
        assert abs(cosine - 1) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(ours[other]), np.linalg.norm(theirs, axis=1).mean(), rtol=1e-5)
    np.testing.assert_array_equal(taken.layers[1].mlp.down.kernel[...], source.layers[1].mlp.down.kernel[...])
    wider = Decoder(dataclasses.replace(CONFIG, d_ff=64), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in the source, must be"):
        take_over(wider, source, old, pieces)


def test_decoding_evaluates_new_weights_in_one_engine(tmp_path):
    task = TASKS["countdown"]
    (tmp_path / "tokenizer.model").write_bytes(build_sentencepiece_model())
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    programs = list(RENDERINGS)
    evaluate = decoded(task, task.problems(2, HELD_OUT_SEED), tokenizer, programs=programs, max_new_tokens=12)
    first = evaluate(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    assert all(first[f"decoded/{program}/{name}"] == 0 for program in programs for name in ("accuracy", "well_formed"))
    assert first["decoded/sequential/total_tokens"] == 12
    ends_at_once = Decoder(CONFIG, rngs=nnx.Rngs(0))
    for layer in ends_at_once.layers:
        for kernel in (layer.attention.o.kernel, layer.mlp.down.kernel):
            kernel[...] = jnp.zeros_like(kernel[...])
    (eos,) = CONFIG.eos_ids
    ends_at_once.embedding[...] = jnp.ones_like(ends_at_once.embedding[...]).at[eos].mul(2.0)
    assert evaluate(ends_at_once)["decoded/sequential/total_tokens"] == 1


def test_a_request_that_fails_does_not_end_an_evaluation(tmp_path, monkeypatch):
    task = TASKS["countdown"]
    (tmp_path / "tokenizer.model").write_bytes(build_sentencepiece_model())
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    generate = Engine.generate

    def fails(engine, *args, **options):
        raise GenerateError(generate(engine, *args, **options), {1: ValueError("no token for this")})

    monkeypatch.setattr(Engine, "generate", fails)
    problems = task.problems(2, HELD_OUT_SEED)
    evaluate = decoded(task, problems, tokenizer, programs=["sequential"], max_new_tokens=4)
    figures = evaluate(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    assert figures["decoded/sequential/accuracy"] == 0 and figures["decoded/sequential/total_tokens"] == 4

"""A model like the embedded one: 0.95M parameters, three and a half hours on two CPU cores with AVX-512.

From scratch it solves 85 to 88% of held-out problems, 75 to 81% after two hours (docs/benchmarks.md). The shipped
weights solve 88 to 89%; the model card says how they came about.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.seed = 0
    config.wave_embeddings = True  # start number embeddings from waves, see tasks/countdown_features.py
    config.matching_heads = True  # start some heads as matchers, see train/initialization.py
    config.match_weight = 3.0  # of the token that says "a match" in the loss
    config.model = config_dict.create(
        d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=384, max_position=2048
    )
    config.samples = config_dict.create(
        seed=0,
        max_len=2048,
        keep_easy=0.4,
        shares=(1.1, 1.0, 0.9, 1.0, 1.6),  # sequential, multiverse, npr, threadweaver, apr
        conclusion_share=0.2,
        first_share=0.2,
        off_share=0.15,
        sizes=(0.03, 0.93, 0.03, 0.01),
        large_share=0.02,
    )
    # what changes from a sample on; 10.3 samples make a step. Drills are of rounds, nodes and answers.
    config.stages = (
        (15_000, {"drill_share": 0.25, "drill_shares": (0.3, 0.35, 0.35)}),
        (160_000, {"drill_share": 0.0}),
        (176_000, {"drill_share": 0.3, "drill_shares": (0.1, 0.4, 0.5), "shares": (1.1, 1.0, 1.0, 1.2, 1.8)}),
    )
    # rows a step of each length, about 5,000 tokens, 3,600 of them learned; the longest fill every fourth step
    config.data = config_dict.create(chunk_size=400, lengths=(640, 1280, 2048), rows=(3, 2, 1))
    config.optimizer = config_dict.create(
        name="muon",
        learning_rate=4.5e-3,
        muon_learning_rate=0.03,
        final_share=0.01,
        warmup_steps=100,
        num_steps=29_000,
        restarts=((12_000, 0.6), (17_000, 0.6)),
        beta2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.loop = config_dict.create(
        log_every=20, eval_every=3000, checkpoint_every=150, keep_checkpoints=3, num_workers=1
    )
    config.num_eval_problems = 100  # teacher-forced
    config.num_decoded_problems = 20  # of those, decoded by the engine under every program
    return config

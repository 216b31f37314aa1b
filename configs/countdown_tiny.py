"""The base recipe made tiny: a run of seconds, to try the trainer."""

from ml_collections import config_dict

from configs import countdown_base


def get_config() -> config_dict.ConfigDict:
    config = countdown_base.get_config()
    config.wave_embeddings = False
    config.optimizer.name = "adamw"
    config.model.update(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64)
    config.samples.max_len = 512
    config.data.update(chunk_size=24, lengths=(128, 512), rows=(2, 1))
    config.optimizer.update(warmup_steps=2, num_steps=20, restarts=())
    config.loop.update(log_every=5, eval_every=10, checkpoint_every=5, num_workers=0)
    config.num_eval_problems = 4
    config.num_decoded_problems = 2
    return config

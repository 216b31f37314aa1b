"""The embedded model for one GPU (made for an H200 and 16 cores): 2.9M parameters, the data and code of the base run.

Not run yet: the number of steps is a guess at what 20 minutes hold, 7 steps of 1.6 TFLOP a second. They learn about
260,000 tokens a second; one core of an AMD EPYC makes 100,000.
"""

from ml_collections import config_dict

from configs import countdown_base


def get_config() -> config_dict.ConfigDict:
    config = countdown_base.get_config()
    config.model.update(d_model=192, num_layers=6, num_heads=6, num_kv_heads=3, d_ff=576)
    firsts = (50_000, 550_000, 600_000)  # of about a million samples, 130 a step: the base run's stages, one decay
    config.stages = tuple((first, changes) for first, (_, changes) in zip(firsts, config.stages, strict=True))
    config.data.update(chunk_size=4000, rows=(36, 26, 4))  # about 64,000 tokens a step
    config.optimizer.update(warmup_steps=300, num_steps=8000, restarts=())
    config.loop.update(eval_every=1000, checkpoint_every=500, num_workers=12)
    config.num_eval_problems = 100
    config.num_decoded_problems = 100
    return config

from apr_jax.reasoning.api import Engine as Engine
from apr_jax.types import SamplingParams as SamplingParams

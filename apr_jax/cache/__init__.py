from apr_jax.cache.cache import KVCache as KVCache
from apr_jax.cache.context import Context as Context
from apr_jax.cache.context import Segment as Segment
from apr_jax.cache.context import marked_segments as marked_segments
from apr_jax.cache.context import own_segments as own_segments
from apr_jax.cache.layout import PlanOverflow as PlanOverflow
from apr_jax.cache.plan_builder import PlanBuilder as PlanBuilder
from apr_jax.cache.pool import PagePool as PagePool

from apr_kernels.paged_attention.api import paged_attention as paged_attention
from apr_kernels.paged_attention.api import prepare as prepare

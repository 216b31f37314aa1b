"""The update of this backend is that of all NVIDIA GPUs."""

from apr_kernels.kv_update.gpu import kv_update as kv_update
from apr_kernels.kv_update.gpu import prepare as prepare

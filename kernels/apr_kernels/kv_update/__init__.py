from apr_kernels.kv_update.api import kv_update as kv_update
from apr_kernels.kv_update.api import prepare as prepare

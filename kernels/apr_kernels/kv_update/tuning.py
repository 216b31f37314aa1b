"""What each backend of the update supports: all that attention does."""

from apr_kernels.paged_attention.tuning import unsupported as unsupported

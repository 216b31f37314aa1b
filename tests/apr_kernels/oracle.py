"""What attention and update must give, in float64, written token by token; shared by the tests of all backends."""

import numpy as np
from apr_kernels import cases


def oracle(data: cases.CaseData) -> tuple[np.ndarray, np.ndarray]:
    """One query, one head, one softmax at a time, in float64."""
    case = data.case
    o = np.zeros(data.q.shape)
    lse = np.full(data.q.shape[:3], -np.inf)
    for r, row in enumerate(case.rows):
        for t in range(row.num_queries if row.slot is not None else 0):
            keys = np.concatenate([data.context[r][0], data.k[r, : t + 1]]).astype(np.float64)
            values = np.concatenate([data.context[r][1], data.v[r, : t + 1]]).astype(np.float64)
            for h in range(case.num_heads):
                kv_head = h * case.num_kv_heads // case.num_heads
                scores = keys[:, kv_head] @ data.q[r, t, h].astype(np.float64) / np.sqrt(case.head_dim)
                top = scores.max()
                weights = np.exp(scores - top)
                lse[r, t, h] = top + np.log(weights.sum())
                o[r, t, h] = weights @ values[:, kv_head] / weights.sum()
    return o, lse


def updated(data: cases.CaseData) -> tuple[np.ndarray, np.ndarray]:
    """What the pages must hold afterwards."""
    size = data.case.page_size
    stores = np.array(data.kv_pages.k), np.array(data.kv_pages.v)
    for store, new in zip(stores, (data.k, data.v)):
        for r, row in enumerate(data.case.rows):
            for t in range(row.num_queries if row.slot is not None else 0):
                page, slot = data.tail_pages[r][(row.tail_len + t) // size], (row.tail_len + t) % size
                if slot == 0:
                    store[:, page] = 0
                store[:, page, slot] = new[r, t]
    return stores

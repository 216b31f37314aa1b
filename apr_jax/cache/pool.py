"""The page pool: a free list, and which pages are in use. References are counted a segment, which holds its pages."""

from apr_jax.types import OutOfPages


class PagePool:
    """Hands out page ids. Page 0, the null page, is never handed out.

    Attributes:
      num_pages: pages of the store, the null page among them.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}, must be >= 2 (page 0 is the null page)")
        self.num_pages = num_pages
        self._in_use = [False] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def total(self) -> int:
        """Pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.total - self.num_free

    def is_in_use(self, page: int) -> bool:
        return self._in_use[page]

    def allocate(self, n: int) -> list[int]:
        """Takes n pages.

        Raises:
          OutOfPages: fewer than n are free; nothing has changed.
        """
        if n > len(self._free):
            raise OutOfPages(n, len(self._free))
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._in_use[page] = True
        return pages

    def release(self, page: int) -> None:
        """Gives a page back. Raises ValueError for one that is not in use."""
        if not 0 < page < self.num_pages or not self._in_use[page]:
            raise ValueError(f"page {page} is not in use: it was released before, or never taken")
        self._in_use[page] = False
        self._free.append(page)

    def check(self) -> None:
        """Asserts that the free list and the pages in use make up the pool."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not any(self._in_use[page] for page in self._free), "a free page is in use"
        assert len(self._free) + sum(self._in_use) == self.total, "a page is lost"

"""The page pool: a free list and a reference count a page."""

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
        self._counts = [0] * num_pages
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

    def count(self, page: int) -> int:
        """References held on a page."""
        return self._counts[page]

    def allocate(self, n: int) -> list[int]:
        """Takes n pages, each with one reference.

        Raises:
          OutOfPages: fewer than n are free; nothing has changed.
        """
        if n > len(self._free):
            raise OutOfPages(n, len(self._free))
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Adds a reference to a page in use. Raises ValueError for a page that is not."""
        if not 0 < page < self.num_pages or self._counts[page] == 0:
            raise ValueError(f"page {page} is not in use")
        self._counts[page] += 1

    def release(self, page: int) -> None:
        """Drops a reference; at zero the page is free. Raises ValueError for a page that is not in use."""
        if not 0 < page < self.num_pages or self._counts[page] == 0:
            raise ValueError(f"page {page} is not in use: its count would fall below zero")
        self._counts[page] -= 1
        if self._counts[page] == 0:
            self._free.append(page)

    def check(self) -> None:
        """Asserts that the free list and the counts agree."""
        assert min(self._counts) >= 0, "a page's count is below zero"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(self._counts[page] == 0 for page in self._free), "a free page is in use"
        assert len(self._free) + sum(c > 0 for c in self._counts) == self.total, "a page is lost"

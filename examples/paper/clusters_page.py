"""Table 5: accuracy cluster by cluster, from the files that ``sinf_table.py`` wrote."""

from __future__ import annotations

from sinf_page import cluster_page as page

__all__ = ["page"]

"""Writing results down: JSON for machines, one self-contained HTML page for people."""

from gazeguard.report.model import CleanReport, GalleryItem, headline

__all__ = ["CleanReport", "GalleryItem", "headline"]

"""What a benchmark run says: its cells as tables, a page with plots, and the page of limits."""

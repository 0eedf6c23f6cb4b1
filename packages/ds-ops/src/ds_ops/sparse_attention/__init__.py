"""Block-sparse attention: layouts, and modules that attend by them."""

"""Scripts whose JSON stands behind a published statement: each runs the product from outside, by its command line."""

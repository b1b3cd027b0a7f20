"""`--report`: one page with every figure, and a gallery with the worst picture first."""

"""Which methods differ: rows and seeds as evidence, tests, a partial order, the verdict in words."""

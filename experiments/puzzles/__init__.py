"""Tasks of many steps: seeded generators, the networks that learn them, what is measured."""

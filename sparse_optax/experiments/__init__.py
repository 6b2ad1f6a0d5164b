"""Experiments: data, models, one train loop, and the tables made with them.

Needs the extra ``sparse_optax[experiments]``. Nothing in the library imports this
package; it uses the library as any other project would.
"""

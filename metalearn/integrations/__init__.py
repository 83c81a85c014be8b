"""Adapters, a module for each framework, which alone it loads: `lightning`, `transformers`, `accelerate`, `recbole`.

In a plain loop `metalearn.torch.MetaScheduler` needs none of them.
"""

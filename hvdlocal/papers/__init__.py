"""The papers' experiments, run again and compared with the published results.

Balles, Teja S and Archambeau (TMLR 2024): LocalAdaScale. Gu, Lyu, Arora, Zhang and Huang (ICLR 2024): the Quadratic
Synchronization Rule.
"""

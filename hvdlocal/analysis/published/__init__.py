"""Tables 2 to 4 of Balles, Teja S and Archambeau (TMLR 2024), and what follows from them by Eq. 16."""

from hvdlocal.analysis.published.crossover import crossovers, skyline
from hvdlocal.analysis.published.tables import METHODS, TABLES, Cell, Table, read_table

__all__ = ["METHODS", "TABLES", "Cell", "Table", "crossovers", "read_table", "skyline"]

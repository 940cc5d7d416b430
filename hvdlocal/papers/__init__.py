"""The experiments of Balles, Teja S and Archambeau (TMLR 2024), run again and put beside what was published."""

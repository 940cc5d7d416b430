"""`hvdlocal advise`: measures steps and collectives on this cluster, and recommends a method and a period."""

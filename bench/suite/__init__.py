"""The suite behind `mmpeft-fast bench`: cases, implementations, rounds, rows, and what is made of rows."""

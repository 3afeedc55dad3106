"""A finished cache for other libraries: torch, pandas, Parquet."""

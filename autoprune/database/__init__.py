"""The level database: Grams, compensation, the store on disk and the stitching of candidates (torch)."""

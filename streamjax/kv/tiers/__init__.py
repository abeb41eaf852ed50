"""The tiers, one file each: what a tier keeps and how it is attended."""

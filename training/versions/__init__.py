"""Policy versions in MLflow: runs, bundles, aliases, promotion.

Must not know how a version was learned or judged.
"""

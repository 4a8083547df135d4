{
    "name": "Bakehouse",
    "summary": "Sessions in PostgreSQL, so that any node can answer, and a separate service for each kind of process",
    "version": "19.0.1",
    "author": "Bakehouse",
    "license": "LGPL-3",
    "category": "Hidden",
    "depends": ["base"],
    "installable": True,
}

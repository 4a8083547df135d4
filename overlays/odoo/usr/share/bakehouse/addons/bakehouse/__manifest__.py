{
    "name": "Bakehouse",
    "summary": "Sessions in PostgreSQL, so that any node can answer; one service per kind of process",
    "version": "19.0.1",
    "author": "Bakehouse",
    "license": "LGPL-3",
    "category": "Hidden",
    "depends": ["base"],
    "installable": True,
}

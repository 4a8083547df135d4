-- The database's users beside those that Patroni makes itself. A database from the backups has them.
-- What fails is not written to the journal: there are passwords in it.
SET log_min_error_statement = panic;
SELECT format('CREATE ROLE %I', name) FROM unnest('{odoo,metrics}'::text[]) name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE odoo LOGIN CREATEDB PASSWORD 'sample-odoo';
ALTER ROLE metrics LOGIN PASSWORD 'sample-metrics';
GRANT pg_monitor TO metrics;

-- Users that Patroni does not create. A database that was restored from a backup has them already.
-- PostgreSQL does not log failed statements here, because they contain passwords.
SET log_min_error_statement = panic;
SELECT format('CREATE ROLE %I', name) FROM unnest('{odoo,metrics}'::text[]) name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE odoo LOGIN CREATEDB PASSWORD 'sample-odoo';
ALTER ROLE metrics LOGIN PASSWORD 'sample-metrics';
GRANT pg_monitor TO metrics;

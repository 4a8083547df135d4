-- The database's users beside those that Patroni makes itself.
CREATE ROLE odoo LOGIN CREATEDB PASSWORD 'sample-odoo';
CREATE ROLE metrics LOGIN PASSWORD 'sample-metrics';
GRANT pg_monitor TO metrics;
-- What pg_rewind calls, and nothing else.
GRANT EXECUTE ON FUNCTION pg_catalog.pg_ls_dir(text, boolean, boolean) TO rewind;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_stat_file(text, boolean) TO rewind;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text) TO rewind;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) TO rewind;

-- The database's users beside those that Patroni makes itself.
CREATE ROLE odoo LOGIN CREATEDB PASSWORD 'sample-odoo';
CREATE ROLE metrics LOGIN PASSWORD 'sample-metrics';
GRANT pg_monitor TO metrics;

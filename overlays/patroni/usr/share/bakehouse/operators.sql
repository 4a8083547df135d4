-- Users of operators (`bakehouse psql`, `bakehouse open postgres`). They have no passwords, so only the rules for the
-- agent's Unix socket admit them (patroni.yml). The primary runs this again after each start and each promotion.
BEGIN;
SET LOCAL client_min_messages = warning;
SELECT format('CREATE ROLE %I', name) FROM unnest('{bakehouse_reader,bakehouse_writer}'::text[]) name
WHERE to_regrole(name) IS NULL \gexec

-- Reads every table of every database, and the statistics of all sessions. It owns nothing, and has the right to write
-- nothing, so a session that turns its read-only mode off gains no right.
ALTER ROLE bakehouse_reader LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT
    CONNECTION LIMIT 10 PASSWORD NULL;
GRANT pg_read_all_data, pg_monitor TO bakehouse_reader;
ALTER ROLE bakehouse_reader SET default_transaction_read_only = on;
-- A query that sorts more than its memory writes temporary files: it must not fill the disk of the primary. Only a
-- superuser can raise this limit.
ALTER ROLE bakehouse_reader SET temp_file_limit = '1GB';

-- Has the rights of Odoo's user, which owns Odoo's database. What a session creates belongs to Odoo's user, so Odoo can
-- change it later. It is a user of its own, because PostgreSQL logs its statements and not Odoo's.
ALTER ROLE bakehouse_writer LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT
    CONNECTION LIMIT 10 PASSWORD NULL;
GRANT odoo TO bakehouse_writer;
ALTER ROLE bakehouse_writer SET role = 'odoo';

SELECT format('ALTER ROLE %I SET %s', name, setting)
FROM unnest('{bakehouse_reader,bakehouse_writer}'::text[]) name,
    unnest(ARRAY[
        -- A query ends with the connection of its operator, and a forgotten one after an hour.
        'client_connection_check_interval = ''1s''',
        'statement_timeout = ''1h''',
        'idle_in_transaction_session_timeout = ''10min''',
        -- While a statement of an operator waits for a lock, Odoo's statements wait behind it.
        'lock_timeout = ''10s''',
        'log_statement = ''all'''
    ]) setting \gexec
COMMIT;

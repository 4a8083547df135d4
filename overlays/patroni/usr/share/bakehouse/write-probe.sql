-- The write of write-probe.service. The role that writes may do nothing else.
SELECT pg_is_in_recovery() AS standby \gset
\if :standby
    \echo standby
    \quit
\endif
\echo PRIMARY
SELECT to_regclass('bakehouse.write_probe') IS NULL AS is_missing \gset
\if :is_missing
    BEGIN;
    SELECT 'CREATE ROLE write_probe NOLOGIN' WHERE to_regrole('write_probe') IS NULL \gexec
    CREATE SCHEMA IF NOT EXISTS bakehouse;
    -- A row fills a page, so that each write needs new space on the disk.
    CREATE TABLE bakehouse.write_probe (written timestamptz NOT NULL, filler text STORAGE PLAIN NOT NULL);
    GRANT USAGE ON SCHEMA bakehouse TO write_probe;
    GRANT INSERT, TRUNCATE ON bakehouse.write_probe TO write_probe;
    COMMIT;
\endif
SET SESSION AUTHORIZATION write_probe;
INSERT INTO bakehouse.write_probe VALUES (now(), repeat('x', 7000));
SELECT pg_relation_size('bakehouse.write_probe') > 4000000 AS is_large \gset
\if :is_large
    -- TRUNCATE waits for everything that reads the table, such as pg_dump. Then a later run empties the table.
    \set ON_ERROR_STOP 0
    SET lock_timeout = '200ms';
    TRUNCATE bakehouse.write_probe;
\endif

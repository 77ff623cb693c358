"""psql: connecting, \\copy, its \\d family, a cancel by SIGINT, large objects."""

import os
import pathlib
import pty
import select
import signal
import subprocess
import tempfile
import urllib.parse

from kit import ADMIN, APP, APP_PASSWORD, CA, HOST, LOGINS, OWN, PORT, TENANT, check, equal, finish, running, wait_until

TLS = {"plain": {"sslmode": "disable"}, "verify-full": {"sslmode": "verify-full", "sslrootcert": CA},
       "require": {"sslmode": "require"}, "defaults": {}}


def dsn(login=OWN, tls="defaults", **more):
    values = {"host": HOST, "port": PORT, **login, **TLS[tls], **more}
    values["dbname"] = values.pop("database")
    quote = lambda value: "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
    return " ".join(f"{name}={quote(value)}" for name, value in values.items())


def psql(text, *options, login=OWN, tls="defaults", status=0, env=None, **more):
    """The whole output, complaints included, of psql fed with `text`."""
    done = subprocess.run(["psql", "-X", *options, dsn(login, tls, **more)], input=text, text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
    if done.returncode != status:
        raise AssertionError(f"exit status {done.returncode}: {done.stdout}")
    return done.stdout.strip()


def value(text, **more):
    return psql(text, "-At", "-v", "ON_ERROR_STOP=1", **more)


def has(text, *parts):
    for part in parts:
        if part not in text:
            raise AssertionError(f"{part!r} is missing in {text!r}")
    for bad in ("ERROR", "FATAL"):
        if bad in text and bad not in parts:
            raise AssertionError(text)


WHO = "SELECT session_user, current_schema(), count(*) FROM bookings WHERE false;"
for tls in TLS:
    for name, login in LOGINS.items():
        with check(f"{tls}: connect: {name}"):
            equal(value(WHO, login=login, tls=tls), f"{TENANT}|{TENANT}|0")
            has(psql("\\conninfo\n", login=login, tls=tls), f'user "{login["user"]}"')
            equal("SSL connection" in psql("\\conninfo\n", login=login, tls=tls), tls != "plain")

app = {"user": APP, "password": APP_PASSWORD, "database": "postgres"}
with check("TLS server name"):
    equal(value(WHO, login=app, tls="verify-full", host=f"{TENANT}.db.example.com", hostaddr=HOST), f"{TENANT}|{TENANT}|0")
with check("URI"):
    uri = f"postgresql://{APP}%40{TENANT}:{urllib.parse.quote(APP_PASSWORD)}@{HOST}:{PORT}/postgres?application_name=it"
    done = subprocess.run(["psql", "-XAtc", "SHOW application_name", uri], capture_output=True, text=True, timeout=60)
    equal((done.stdout.strip(), done.returncode), ("it", 0))
with check("PGOPTIONS"):
    env = {"PGOPTIONS": f"-c pgusher.tenant={TENANT} -c statement_timeout=12345ms -c work_mem=3MB"}
    text = "SHOW statement_timeout; SET work_mem = '5MB'; RESET work_mem; SHOW work_mem;"
    equal(value(text, login=app, env=env), "12345ms\nSET\nRESET\n3MB")
with check("PGTZ, PGDATESTYLE, PGCLIENTENCODING"):
    env = {"PGTZ": "Asia/Tokyo", "PGDATESTYLE": "German", "PGCLIENTENCODING": "LATIN1"}
    equal(value("SHOW timezone; SHOW datestyle; SHOW client_encoding;", env=env), "Asia/Tokyo\nGerman, DMY\nLATIN1")
with check("two places that disagree are refused"):
    has(psql("", login=app, status=2, env={"PGOPTIONS": "-c pgusher.tenant=client_002"}, application_name=f"{TENANT}/x"), "FATAL")
with check("a wrong password, and a tenant that does not exist"):
    texts = [psql("", login=OWN | {"user": user, "password": "wrong"}, status=2) for user in (TENANT, "nobody_here")]
    for text, user in zip(texts, (TENANT, "nobody_here")):
        has(text, "FATAL", f'password authentication failed for user "{user}"')
with check("no tenant named"):
    has(psql("", login=app, status=2), "FATAL")

for tls in ("plain", "verify-full"):
    work = pathlib.Path(tempfile.mkdtemp())
    with check(f"{tls}: \\copy in and out"):
        lines = "".join(f"{n}\tline {n}\n" for n in range(20000))
        (work / "in").write_text(lines)
        has(psql(f"DROP TABLE IF EXISTS t_psql; CREATE TABLE t_psql (id int PRIMARY KEY, t text);\n"
                 f"\\copy t_psql FROM '{work}/in'\n\\copy (SELECT * FROM t_psql ORDER BY id) TO '{work}/out'\n", tls=tls),
            "COPY 20000\nCOPY 20000")
        equal((work / "out").read_text(), lines)
    with check(f"{tls}: COPY FROM STDIN inside a script"):
        equal(value("BEGIN;\nCOPY t_psql FROM STDIN;\n-1\tone\n-2\ttwo\n\\.\nROLLBACK;\nSELECT count(*) FROM t_psql;\n", tls=tls),
              "BEGIN\nCOPY 2\nROLLBACK\n20000")
    with check(f"{tls}: parameters"):
        equal(value("\\set v 'it''s'\nSELECT :'v', t FROM t_psql WHERE id = 7;", tls=tls), "it's|line 7")
    with check(f"{tls}: a transaction that rolls back"):
        equal(value("BEGIN; DELETE FROM t_psql; ROLLBACK; SELECT count(*) FROM t_psql;", tls=tls), "BEGIN\nDELETE 20000\nROLLBACK\n20000")
    with check(f"{tls}: an error"):
        text = psql("\\set VERBOSITY verbose\nINSERT INTO t_psql VALUES (1);\nSELECT 'usable';", tls=tls)
        has(text, "ERROR", "23505", 't_psql_pkey', "usable")
        text = psql("\\set VERBOSITY verbose\nSELECT 1; SELECT 1/0; SELECT 'not run';\nSELECT 'usable';", tls=tls)
        has(text, "ERROR", "22012", "usable")
    with check(f"{tls}: cancel by Ctrl-C"):
        # On a terminal: anywhere else psql ends at the first cancel.
        terminal, its_side = pty.openpty()
        process = subprocess.Popen(["psql", "-Xn", "-P", "pager=off", dsn(tls=tls)], stdin=its_side, stdout=its_side,
                                   stderr=its_side, start_new_session=True)
        os.close(its_side)
        output = ""

        def say(text, until):
            global output
            os.write(terminal, text.encode())
            while until not in output:
                if not select.select([terminal], [], [], 50)[0]:
                    raise AssertionError(f"{until!r} is missing in {output!r}")
                output += os.read(terminal, 65536).decode()
            found, output = output.split(until, 1)
            return found

        def is_running():
            direct = dsn(ADMIN, "plain", host="127.0.0.1", port=ADMIN["port"])
            done = subprocess.run(["psql", "-XAtc", running("cancel_psql"), direct], capture_output=True, text=True)
            return done.stdout.strip() == "1"

        os.write(terminal, b"SELECT pg_sleep(60) /* cancel_psql */;\n")
        wait_until("the query runs", is_running)
        process.send_signal(signal.SIGINT)
        say("", "canceling statement due to user request")
        for number in range(50):
            equal("ERROR" in say(f"SELECT 'usable ' || {number};\n", f"\n usable {number}\r"), False)
        os.write(terminal, b"\\q\n")
        equal(process.wait(30), 0)
        os.close(terminal)
    with check(f"{tls}: prepared statement used many times"):
        executes = "".join(f"EXECUTE p({n});\n" for n in range(200))
        equal(value(f"BEGIN;\nPREPARE p (int) AS SELECT $1 + 1;\n{executes}COMMIT;\n", tls=tls).split("\n")[2:-1],
              [str(n + 1) for n in range(200)])
    with check(f"{tls}: FETCH_COUNT"):
        equal(value("\\set FETCH_COUNT 100\nSELECT n FROM generate_series(1, 1000) n;", tls=tls).split("\n"),
              [str(n) for n in range(1, 1001)])
    with check(f"{tls}: \\watch, \\gexec, \\gset, \\if"):
        equal(value("SELECT 'SELECT ' || n FROM generate_series(1, 3) n \\gexec\nSELECT 5 > 4 AS more \\gset\n\\if :more\n\\echo yes\n\\endif\n", tls=tls),
              "1\n2\n3\nyes")
    with check(f"{tls}: large objects"):
        blob = work / "blob"
        blob.write_bytes(bytes(range(256)) * 2000)
        text = value(f"\\lo_import '{blob}' 'a comment'\n\\lo_export :LASTOID '{work}/back'\nSELECT length(lo_get(:LASTOID));\n", tls=tls)
        has(text, "512000")
        equal((work / "back").read_bytes(), blob.read_bytes())
        value(f"\\lo_unlink {text.split()[1]}\n", tls=tls)

SETUP = """
DROP TABLE IF EXISTS d_child, d_parent, d_part CASCADE; DROP VIEW IF EXISTS d_view; DROP MATERIALIZED VIEW IF EXISTS d_mat;
DROP FUNCTION IF EXISTS d_function; DROP TYPE IF EXISTS d_enum, d_composite; DROP DOMAIN IF EXISTS d_domain; DROP SEQUENCE IF EXISTS d_seq;
CREATE TYPE d_enum AS ENUM ('a', 'b'); CREATE TYPE d_composite AS (x int, y text); CREATE DOMAIN d_domain AS int CHECK (value > 0);
CREATE SEQUENCE d_seq;
CREATE TABLE d_parent (id serial PRIMARY KEY, e d_enum DEFAULT 'a', n d_domain, t text COLLATE "C" UNIQUE, g int GENERATED ALWAYS AS (1 + 1) STORED);
COMMENT ON TABLE d_parent IS 'a comment'; COMMENT ON COLUMN d_parent.t IS 'a column';
CREATE TABLE d_child (id int GENERATED ALWAYS AS IDENTITY, parent int REFERENCES d_parent, CHECK (id > 0));
CREATE INDEX ON d_child (parent) WHERE parent > 5; CREATE STATISTICS d_stat ON id, parent FROM d_child;
CREATE TABLE d_part (k int, v text) PARTITION BY RANGE (k); CREATE TABLE d_part_1 PARTITION OF d_part FOR VALUES FROM (0) TO (10);
CREATE VIEW d_view AS SELECT id, t FROM d_parent; CREATE MATERIALIZED VIEW d_mat AS SELECT count(*) FROM d_parent;
CREATE RULE d_rule AS ON INSERT TO d_view DO INSTEAD NOTHING;
CREATE FUNCTION d_function(a int) RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END' """
SETUP = SETUP.replace("d_function(a int)", "d_function()") + """;
CREATE TRIGGER d_trigger BEFORE INSERT ON d_parent FOR EACH ROW EXECUTE FUNCTION d_function();
ALTER TABLE d_child ENABLE ROW LEVEL SECURITY; CREATE POLICY d_policy ON d_child USING (id > 1);
"""
with check("\\d: objects of every kind"):
    value(SETUP)
# What each has to show; none may complain.
DESCRIBE = {
    "\\d": ["d_parent", "d_view"], "\\d+": ["d_parent", "a comment"], "\\dt": ["bookings"], "\\dt+": ["bookings", "a comment"],
    "\\d d_parent": ["d_trigger", "Referenced by"], "\\d+ d_parent": ["a column"], "\\d d_child": ["d_policy", "Foreign-key"],
    "\\d+ d_child": ["d_stat"], "\\d d_view": ["id"], "\\d+ d_view": ["SELECT", "d_rule"], "\\d d_part": ["Partition key"],
    "\\d+ d_part": ["d_part_1"], "\\d d_parent_pkey": ["btree"], "\\d d_seq": ["bigint"], "\\d+ d_mat": ["count"],
    "\\di": ["d_parent_pkey"], "\\di+": ["d_parent_pkey"], "\\ds": ["d_seq"], "\\ds+": ["d_seq"], "\\dv": ["d_view"],
    "\\dv+": ["d_view"], "\\dm": ["d_mat"], "\\dP": ["d_part"], "\\df": ["d_function"],
    "\\df+": ["d_function"], "\\sf d_function": ["plpgsql"], "\\sv d_view": ["SELECT"], "\\dT": ["d_enum"],
    "\\dT+": ["d_enum"], "\\dD": ["d_domain"], "\\dn": [TENANT], "\\dn+": [TENANT], "\\du": [TENANT], "\\du+": [TENANT],
    "\\dg": [TENANT], "\\l": ["tenants"], "\\l+": ["tenants"], "\\dp": ["d_parent"], "\\z": ["d_parent"], "\\ddp": [], "\\dx": [],
    "\\dx+": [], "\\dO": [], "\\dC": [], "\\dF": ["english"], "\\db": ["pg_default"], "\\dL": ["plpgsql"], "\\do": [], "\\dX": ["d_stat"],
    "\\dy": [], "\\da": [], "\\dA": ["btree"], "\\dd": [], "\\des": [], "\\dew": [], "\\dRp": [], "\\dRs": [],
    "\\dconfig work_mem": ["work_mem"], "\\encoding": ["UTF8"], "\\conninfo": [TENANT], "\\dt *.*": ["bookings"],
}
for command, parts in DESCRIBE.items():
    with check(f"{command}"):
        # From an environment whose psql is older, a command may be unknown: that would be its error, not the proxy's.
        has(psql(command + "\n", "-P", "pager=off"), *parts)
# They would show other tenants, or lock their tables, and have no way to show the tenant's own only.
for command in ("\\dP+", "\\drds", "\\dl"):
    with check(f"{command} is refused"):
        has(psql("\\set VERBOSITY verbose\n" + command + "\n", "-P", "pager=off"), "ERROR", "42501")
with check("\\dt shows the tenant's own tables only"):
    schemas = {line.split("|")[0] for line in psql("\\dt\n", "-At").splitlines()}
    equal(schemas, {TENANT})
with check("cleaning up"):
    value(SETUP.split("CREATE TYPE")[0])

finish()

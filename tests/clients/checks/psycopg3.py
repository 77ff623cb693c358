"""psycopg 3."""

import threading

import psycopg
from psycopg import errors
from psycopg_pool import ConnectionPool

from kit import ADMIN, APP, APP_PASSWORD, CA, HOST, LISTENS, LOGINS, OWN, PORT, TENANT, check, equal, finish, running, wait_until


def parameters(login, tls):
    more = {"plain": {"sslmode": "disable"}, "verify-full": {"sslmode": "verify-full", "sslrootcert": CA},
            "require": {"sslmode": "require"}, "defaults": {}}[tls]
    login = {("dbname" if name == "database" else name): value for name, value in login.items()}
    return {"host": HOST, "port": PORT, **login, **more}


def connect(login=OWN, tls="defaults", **more):
    return psycopg.connect(**parameters(login, tls), **more)


def who(connection):
    return connection.execute("SELECT session_user, current_schema(), count(*) FROM bookings WHERE false").fetchone()


for tls in ("defaults", "plain", "require", "verify-full"):
    for name, login in LOGINS.items():
        with check(f"{tls}: connect: {name}"), connect(login, tls) as connection:
            equal(who(connection), (TENANT, TENANT, 0))
            equal(connection.pgconn.ssl_in_use, tls != "plain")

with check("TLS server name"):
    login = {"user": APP, "password": APP_PASSWORD, "dbname": "postgres"}
    with psycopg.connect(host=f"{TENANT}.db.example.com", hostaddr=HOST, port=PORT, sslmode="verify-full",
                         sslrootcert=CA, **login) as connection:
        equal(who(connection), (TENANT, TENANT, 0))

for tls in ("plain", "verify-full"):
    with connect(tls=tls) as connection:
        cursor = connection.cursor()
        cursor.execute("DROP TABLE IF EXISTS t_psycopg3")
        cursor.execute("CREATE TABLE t_psycopg3 (id int PRIMARY KEY, t text, at timestamptz, doc jsonb, list int[])")
        connection.commit()

        with check(f"{tls}: parameters"):
            cursor.execute("INSERT INTO t_psycopg3 VALUES (%s, %s, now(), %s, %s) RETURNING t, list",
                           (1, "quote ' and ü", psycopg.types.json.Jsonb({"a": [1, None]}), [1, 2]))
            equal(cursor.fetchone(), ("quote ' and ü", [1, 2]))
            equal(cursor.execute("SELECT doc->'a'->0 FROM t_psycopg3 WHERE id = %b", (1,), binary=True).fetchone(), (1,))
            cursor.executemany("INSERT INTO t_psycopg3 (id, t) VALUES (%s, %s)", [(n, "many") for n in range(100, 200)])
            connection.commit()

        with check(f"{tls}: COPY in and out"):
            with cursor.copy("COPY t_psycopg3 (id, t) FROM STDIN") as copy:
                for number in range(1000, 21000):
                    copy.write_row((number, "x" * 50))
            equal(cursor.rowcount, 20000)
            with cursor.copy("COPY (SELECT id FROM t_psycopg3 WHERE id >= 1000 ORDER BY id) TO STDOUT (FORMAT binary)") as copy:
                copy.set_types(["int4"])
                equal([row[0] for row in copy.rows()], list(range(1000, 21000)))
            connection.commit()

        with check(f"{tls}: COPY that the client ends"):
            try:
                with cursor.copy("COPY t_psycopg3 (id, t) FROM STDIN") as copy:
                    copy.write_row((30000, "not kept"))
                    raise ValueError("ours")
            except ValueError:
                pass
            connection.rollback()
            equal(cursor.execute("SELECT count(*) FROM t_psycopg3 WHERE id = 30000").fetchone(), (0,))

        with check(f"{tls}: a transaction that rolls back"):
            connection.commit()
            with connection.transaction(force_rollback=True):
                cursor.execute("DELETE FROM t_psycopg3")
                with connection.transaction():
                    cursor.execute("INSERT INTO t_psycopg3 (id) VALUES (1)")
                equal(cursor.execute("SELECT count(*) FROM t_psycopg3").fetchone(), (1,))
            equal(cursor.execute("SELECT count(*) FROM t_psycopg3").fetchone(), (20101,))
            connection.commit()

        with check(f"{tls}: an error"):
            try:
                cursor.execute("INSERT INTO t_psycopg3 (id) VALUES (%s)", (1,))
                raise AssertionError("the unique violation is missing")
            except errors.UniqueViolation as error:
                equal((error.sqlstate, error.diag.constraint_name), ("23505", "t_psycopg3_pkey"))
            try:
                cursor.execute("SELECT 1")
                raise AssertionError("a failed transaction goes on")
            except errors.InFailedSqlTransaction:
                connection.rollback()
            equal(cursor.execute("SELECT 1").fetchone(), (1,))
            connection.commit()

        with check(f"{tls}: cancel"):
            for method in (connection.cancel_safe, connection.cancel):
                mark = f"cancel_psycopg3_{method.__name__}"
                outcome = []

                def sleep(mark=mark, outcome=outcome):
                    try:
                        outcome.append(cursor.execute(f"SELECT pg_sleep(60), %s /* {mark} */", (1,)).fetchone())
                    except Exception as error:
                        outcome.append(error)

                thread = threading.Thread(target=sleep)
                thread.start()
                with psycopg.connect(**{("dbname" if k == "database" else k): v for k, v in ADMIN.items()},
                                     autocommit=True) as admin:
                    wait_until("the query runs", lambda: admin.execute(running(mark)).fetchone()[0])
                method()
                thread.join()
                equal(type(outcome[0]), errors.QueryCanceled)
                connection.rollback()
                for number in range(50):
                    equal(cursor.execute("SELECT %s::int", (number,)).fetchone(), (number,))
                connection.commit()

        with check(f"{tls}: prepared statements used many times"):
            connection.prepare_threshold = 0
            for number in range(300):
                equal(cursor.execute("SELECT %s::int + 1", (number,)).fetchone(), (number + 1,))
                equal(cursor.execute("SELECT %s::text", (str(number),)).fetchone(), (str(number),))
                connection.commit()
            for number in range(250):
                equal(cursor.execute(f"SELECT {number} + %s::int", (1,)).fetchone(), (number + 1,))
                connection.commit()

        with check(f"{tls}: pipeline"):
            with connection.pipeline():
                cursors = [connection.execute("SELECT %s::int", (number,)) for number in range(100)]
                equal([c.fetchone()[0] for c in cursors], list(range(100)))
            connection.commit()

        with check(f"{tls}: server-side cursor"):
            with connection.cursor(name="scroll") as scroll:
                scroll.execute("SELECT generate_series(1, 1000)")
                equal(sum(row[0] for row in scroll), 500500)
            connection.commit()

with check("pool: 8 threads share 3 connections, checked before use"):
    with connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t_psycopg3_pool (n int)")
        connection.execute("TRUNCATE t_psycopg3_pool")
    conninfo = psycopg.conninfo.make_conninfo(**parameters(OWN, "defaults"))
    with ConnectionPool(conninfo, min_size=1, max_size=3, check=ConnectionPool.check_connection) as pool:

        def work():
            for number in range(25):
                with pool.connection() as connection:
                    connection.execute("INSERT INTO t_psycopg3_pool VALUES (%s)", (number,))

        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        with pool.connection() as connection:
            equal(connection.execute("SELECT count(*), sum(n) FROM t_psycopg3_pool").fetchone(), (200, 2400))

for tls in ("plain", "verify-full"):
    with check(f"{tls}: the server ends the connection"):
        with connect(tls=tls, autocommit=True) as connection, psycopg.connect(
            **{("dbname" if k == "database" else k): v for k, v in ADMIN.items()}, autocommit=True
        ) as admin:
            outcome = []

            def sleep(connection=connection, outcome=outcome):
                try:
                    outcome.append(connection.execute("SELECT pg_sleep(60) /* end_psycopg3 */").fetchone())
                except Exception as error:
                    outcome.append(error)

            thread = threading.Thread(target=sleep)
            thread.start()
            wait_until("the query runs", lambda: admin.execute(running("end_psycopg3")).fetchone()[0])
            admin.execute(running("end_psycopg3").replace("count(*)", "pg_terminate_backend(pid)"))
            thread.join()
            equal(type(outcome[0]), errors.AdminShutdown)
            equal("SSL error" in str(outcome[0]), False)

if LISTENS:
    with check("notifications, one's own and another's"), connect(autocommit=True) as one, connect() as two:
        one.execute("LISTEN t_psycopg3")
        one.execute("NOTIFY t_psycopg3, 'own'")
        two.execute("SELECT pg_notify('t_psycopg3', 'other')")
        two.commit()
        heard = list(one.notifies(timeout=30, stop_after=2))
        equal([(n.channel, n.payload, n.pid == one.info.backend_pid) for n in heard],
              [("t_psycopg3", "own", True), ("t_psycopg3", "other", False)])
        # Without autocommit: what is rolled back was not said.
        two.execute("LISTEN t_psycopg3")
        two.rollback()
        one.execute("UNLISTEN t_psycopg3")
        one.execute("NOTIFY t_psycopg3, 'nobody'")
        equal(one.execute("SELECT count(*) FROM pg_listening_channels()").fetchone(), (0,))
        equal(list(one.notifies(timeout=0.3)) + list(two.notifies(timeout=0.3)), [])

with check("wrong password"):
    try:
        connect(OWN | {"password": "wrong"})
        raise AssertionError("it was let in")
    except psycopg.OperationalError as error:
        equal("password authentication failed" in str(error), True)

finish()

"""psycopg2: simple protocol only, and libpq's old PQcancel."""

import io
import threading

import psycopg2
import psycopg2.errors
from psycopg2 import extras, pool

from kit import ADMIN, CA, HOST, LOGINS, OWN, PORT, TENANT, check, equal, finish, running, wait_until


def connect(login=OWN, tls="defaults"):
    more = {"plain": {"sslmode": "disable"}, "verify-full": {"sslmode": "verify-full", "sslrootcert": CA},
            "require": {"sslmode": "require"}, "defaults": {}}[tls]
    return psycopg2.connect(host=HOST, port=PORT, **login, **more)


for tls in ("defaults", "plain", "require", "verify-full"):
    for name, login in LOGINS.items():
        with check(f"{tls}: connect: {name}"):
            connection = connect(login, tls)
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT session_user, current_schema(), count(*) FROM bookings WHERE false")
                equal(cursor.fetchone(), (TENANT, TENANT, 0))
                equal(connection.info.ssl_in_use, tls != "plain")
            connection.close()

admin = psycopg2.connect(**ADMIN)
admin.autocommit = True


def is_running(mark):
    with admin.cursor() as cursor:
        cursor.execute(running(mark))
        return cursor.fetchone()[0]


for tls in ("plain", "verify-full"):
    connection = connect(tls=tls)
    cursor = connection.cursor()
    cursor.execute("DROP TABLE IF EXISTS t_psycopg2; CREATE TABLE t_psycopg2 (id int PRIMARY KEY, t text)")
    connection.commit()

    with check(f"{tls}: parameters"):
        cursor.execute("INSERT INTO t_psycopg2 VALUES (%s, %s) RETURNING t", (1, "quote ' and ü \\ %"))
        equal(cursor.fetchone(), ("quote ' and ü \\ %",))
        extras.execute_values(cursor, "INSERT INTO t_psycopg2 VALUES %s", [(n, "many") for n in range(100, 1100)])
        connection.commit()

    with check(f"{tls}: COPY in and out"):
        cursor.copy_expert("COPY t_psycopg2 FROM STDIN", io.StringIO("".join(f"{n}\tline\n" for n in range(2000, 22000))))
        out = io.StringIO()
        cursor.copy_expert("COPY (SELECT id FROM t_psycopg2 WHERE id >= 2000 ORDER BY id) TO STDOUT", out)
        equal(out.getvalue(), "".join(f"{n}\n" for n in range(2000, 22000)))
        connection.commit()

    with check(f"{tls}: COPY with a bad line"):
        try:
            cursor.copy_expert("COPY t_psycopg2 FROM STDIN", io.StringIO("30000\tfine\nnumber\tbad\n" + "31000\tx\n" * 50000))
            raise AssertionError("the bad line was taken")
        except psycopg2.errors.InvalidTextRepresentation:
            connection.rollback()
        cursor.execute("SELECT count(*) FROM t_psycopg2 WHERE id >= 30000")
        equal(cursor.fetchone(), (0,))

    with check(f"{tls}: a transaction that rolls back"):
        cursor.execute("DELETE FROM t_psycopg2")
        connection.rollback()
        cursor.execute("SELECT count(*) FROM t_psycopg2")
        equal(cursor.fetchone(), (21001,))
        connection.commit()

    with check(f"{tls}: an error"):
        try:
            cursor.execute("INSERT INTO t_psycopg2 VALUES (1)")
            raise AssertionError("the unique violation is missing")
        except psycopg2.errors.UniqueViolation as error:
            equal(error.pgcode, "23505")
        connection.rollback()
        cursor.execute("SELECT 1")
        equal(cursor.fetchone(), (1,))
        connection.commit()

    with check(f"{tls}: cancel"):
        outcome = []

        def sleep(cursor=cursor, outcome=outcome):
            try:
                cursor.execute("SELECT pg_sleep(60) /* cancel_psycopg2 */")
                outcome.append("it slept to its end")
            except Exception as error:
                outcome.append(type(error))

        thread = threading.Thread(target=sleep)
        thread.start()
        wait_until("the query runs", lambda: is_running("cancel_psycopg2"))
        connection.cancel()
        thread.join()
        equal(outcome, [psycopg2.errors.QueryCanceled])
        connection.rollback()
        for number in range(50):
            cursor.execute("SELECT %s", (number,))
            equal(cursor.fetchone(), (number,))
        connection.commit()

    with check(f"{tls}: PREPARE in a transaction"):
        cursor.execute("PREPARE plan_a (int) AS SELECT $1 + 1")
        for number in range(200):
            cursor.execute("EXECUTE plan_a (%s)", (number,))
            equal(cursor.fetchone(), (number + 1,))
        cursor.execute("DEALLOCATE plan_a")
        connection.commit()

    with check(f"{tls}: server-side cursor"):
        with connection.cursor(name="scroll") as scroll:
            scroll.execute("SELECT generate_series(1, 5000)")
            equal(sum(row[0] for row in scroll), 12502500)
        connection.commit()

    with check(f"{tls}: large object"):
        large = connection.lobject(0, "wb")
        large.write(b"\0\1\2" * 100000)
        number = large.oid
        large.close()
        connection.commit()
        equal(connection.lobject(number, "rb").read(), b"\0\1\2" * 100000)
        connection.lobject(number, "w").unlink()
        connection.commit()
    connection.close()

with check("pool"):
    connections = pool.ThreadedConnectionPool(1, 3, host=HOST, port=PORT, **OWN)
    for number in range(30):
        connection = connections.getconn()
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT %s", (number,))
            equal(cursor.fetchone(), (number,))
        connections.putconn(connection)
    connections.closeall()

finish()

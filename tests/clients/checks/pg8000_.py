"""pg8000: each of Parse, Describe, Bind and Execute in a Sync of its own. It cannot cancel."""

import io
import ssl

import pg8000.dbapi
import pg8000.native

from kit import CA, HOST, LOGINS, OWN, PORT, TENANT, check, equal, finish


def connect(login=OWN, tls="plain"):
    login = dict(login)
    if "options" in login:
        return None
    context = {"plain": None, "require": True, "verify-full": ssl.create_default_context(cafile=CA)}[tls]
    return pg8000.dbapi.connect(host=HOST, port=PORT, ssl_context=context, **login)


def fetch(cursor, *query):
    cursor.execute(*query)
    return [tuple(row) for row in cursor.fetchall()]


for tls in ("plain", "require", "verify-full"):
    for name, login in LOGINS.items():
        if name == "options":
            continue  # it has no such parameter
        with check(f"{tls}: connect: {name}"):
            connection = connect(login, tls)
            query = "SELECT session_user::text, current_schema()::text, count(*) FROM bookings WHERE false"
            equal(fetch(connection.cursor(), query), [(TENANT, TENANT, 0)])
            connection.close()

for tls in ("plain", "verify-full"):
    connection = connect(tls=tls)
    cursor = connection.cursor()
    cursor.execute("DROP TABLE IF EXISTS t_pg8000")
    cursor.execute("CREATE TABLE t_pg8000 (id int PRIMARY KEY, t text)")
    connection.commit()

    with check(f"{tls}: parameters"):
        text = "quote ' and ü"
        equal(fetch(cursor, "INSERT INTO t_pg8000 VALUES (%s, %s) RETURNING t", (1, text)), [(text,)])
        cursor.executemany("INSERT INTO t_pg8000 VALUES (%s, %s)", [(n, "many") for n in range(100, 200)])
        connection.commit()

    with check(f"{tls}: COPY in and out"):
        lines = b"".join(b"%d\tline\n" % n for n in range(2000, 12000))
        cursor.execute("COPY t_pg8000 FROM STDIN", stream=io.BytesIO(lines))
        out = io.BytesIO()
        cursor.execute("COPY (SELECT * FROM t_pg8000 WHERE id >= 2000 ORDER BY id) TO STDOUT", stream=out)
        equal(out.getvalue(), lines)
        connection.commit()

    with check(f"{tls}: a transaction that rolls back"):
        cursor.execute("DELETE FROM t_pg8000")
        connection.rollback()
        equal(fetch(cursor, "SELECT count(*) FROM t_pg8000"), [(10101,)])
        connection.commit()

    with check(f"{tls}: an error"):
        try:
            cursor.execute("INSERT INTO t_pg8000 VALUES (%s)", (1,))
            raise AssertionError("the unique violation is missing")
        except pg8000.dbapi.DatabaseError as error:
            equal(error.args[0]["C"], "23505")
        connection.rollback()
        equal(fetch(cursor, "SELECT 1"), [(1,)])
        connection.commit()

    with check(f"{tls}: prepared statements used many times"):
        context = None if tls == "plain" else ssl.create_default_context(cafile=CA)
        with pg8000.native.Connection(host=HOST, port=PORT, ssl_context=context, **OWN) as native:
            statement = native.prepare("SELECT CAST(:n AS int) + 1")
            for number in range(300):
                equal(statement.run(n=number), [[number + 1]])
            statement.close()
    connection.close()

finish()

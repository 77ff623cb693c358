"""asyncpg: pipelines with Flush, its own type lookups, and a pool that resets connections."""

import asyncio
import ssl

import asyncpg

from kit import ADMIN, CA, HOST, LISTENS, LOGINS, OWN, PORT, TENANT, check, equal, finish, running


def tls_context(tls):
    return {"defaults": None, "plain": False, "require": "require",
            "verify-full": ssl.create_default_context(cafile=CA)}[tls]


def parameters(login, tls):
    login = dict(login)
    settings = {name: login.pop(name) for name in ("application_name",) if name in login}
    if "options" in login:
        settings["options"] = login.pop("options")
    more = {} if tls == "defaults" else {"ssl": tls_context(tls)}
    return {"host": HOST, "port": PORT, **login, **more, "server_settings": settings}


def connect(login=OWN, tls="defaults"):
    return asyncpg.connect(**parameters(login, tls))


async def cancelled(connection, admin, mark, query):
    task = asyncio.ensure_future(query(connection))
    for _ in range(3000):
        if await admin.fetchval(running(mark)):
            break
        await asyncio.sleep(0.01)
    task.cancel()
    try:
        await task
        raise AssertionError("it slept to its end")
    except asyncio.CancelledError:
        pass
    for number in range(50):
        equal(await connection.fetchval("SELECT $1::int", number), number)
    equal(await admin.fetchval(running(mark)), 0)


async def main():
    for tls in ("defaults", "plain", "require", "verify-full"):
        for name, login in LOGINS.items():
            with check(f"{tls}: connect: {name}"):
                connection = await connect(login, tls)
                row = await connection.fetchrow("SELECT session_user::text, current_schema()::text, count(*) FROM bookings WHERE false")
                equal(tuple(row), (TENANT, TENANT, 0))
                equal(connection._transport.get_extra_info("ssl_object") is not None, tls != "plain")
                await connection.close()

    admin = await asyncpg.connect(**ADMIN)
    for tls in ("plain", "verify-full"):
        connection = await connect(tls=tls)
        await connection.execute("DROP TABLE IF EXISTS t_asyncpg; DROP TYPE IF EXISTS mood;"
                                 "CREATE TYPE mood AS ENUM ('sad', 'glad');"
                                 "CREATE TABLE t_asyncpg (id int PRIMARY KEY, t text, m mood[])")

        with check(f"{tls}: parameters"):
            text = "quote ' and ü"
            equal(await connection.fetchval("INSERT INTO t_asyncpg VALUES ($1, $2) RETURNING t", 1, text), text)
            equal(await connection.fetchval("SELECT $1::mood[]", ["glad", "sad"]), ["glad", "sad"])
            await connection.executemany("INSERT INTO t_asyncpg VALUES ($1, $2)", [(n, "many") for n in range(100, 1100)])

        with check(f"{tls}: COPY in and out"):
            records = [(n, "line", None) for n in range(2000, 22000)]
            equal(await connection.copy_records_to_table("t_asyncpg", records=records), "COPY 20000")
            chunks = []

            async def write(chunk, chunks=chunks):
                chunks.append(chunk)

            query = "SELECT id FROM t_asyncpg WHERE id >= 2000 ORDER BY id"
            equal(await connection.copy_from_query(query, output=write), "COPY 20000")
            equal(b"".join(chunks), b"".join(b"%d\n" % n for n in range(2000, 22000)))

        with check(f"{tls}: a transaction that rolls back"):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("DELETE FROM t_asyncpg")
            try:
                async with connection.transaction():
                    await connection.execute("INSERT INTO t_asyncpg VALUES (1)")
                    raise ValueError("to the savepoint")
            except ValueError:
                pass
            equal(await connection.fetchval("SELECT count(*) FROM t_asyncpg"), 0)
            await transaction.rollback()
            equal(await connection.fetchval("SELECT count(*) FROM t_asyncpg"), 21001)

        with check(f"{tls}: an error"):
            try:
                await connection.execute("INSERT INTO t_asyncpg VALUES ($1)", 1)
                raise AssertionError("the unique violation is missing")
            except asyncpg.UniqueViolationError as error:
                equal(error.sqlstate, "23505")
            equal(await connection.fetchval("SELECT 1"), 1)

        with check(f"{tls}: cancel"):
            await cancelled(connection, admin, "cancel_asyncpg_a",
                            lambda c: c.execute("SELECT pg_sleep(60) /* cancel_asyncpg_a */"))
            await cancelled(connection, admin, "cancel_asyncpg_b",
                            lambda c: c.fetch("SELECT pg_sleep($1) /* cancel_asyncpg_b */", 60))

        with check(f"{tls}: a timeout cancels"):
            try:
                await connection.fetch("SELECT pg_sleep($1) /* timeout_asyncpg */", 60, timeout=0.2)
                raise AssertionError("it slept to its end")
            except asyncio.TimeoutError:
                pass
            equal(await connection.fetchval("SELECT 1"), 1)

        with check(f"{tls}: prepared statements used many times"):
            statement = await connection.prepare("SELECT $1::int + 1")
            for number in range(300):
                equal(await statement.fetchval(number), number + 1)
            for number in range(250):
                equal(await connection.fetchval(f"SELECT {number} + $1::int", 1), number + 1)

        with check(f"{tls}: cursor"):
            async with connection.transaction():
                total = 0
                async for row in connection.cursor("SELECT generate_series(1, 5000) AS n", prefetch=100):
                    total += row["n"]
                equal(total, 12502500)

        with check(f"{tls}: settings and reset"):
            await connection.execute("SET LOCAL work_mem = '1MB'; SELECT 1")
            await connection.reset()
            equal(await connection.fetchval("SELECT current_schema()"), TENANT)
        await connection.close()

    with check("pool: 40 tasks share 4 connections"):
        async with asyncpg.create_pool(min_size=1, max_size=4, **parameters(OWN, "defaults")) as pool:
            await pool.execute("CREATE TABLE IF NOT EXISTS t_asyncpg_pool (n int); TRUNCATE t_asyncpg_pool")

            async def work(number):
                async with pool.acquire() as connection, connection.transaction():
                    await connection.execute("INSERT INTO t_asyncpg_pool VALUES ($1)", number)

            await asyncio.gather(*(work(number) for number in range(40)))
            equal(await pool.fetchval("SELECT sum(n) FROM t_asyncpg_pool"), 780)

    if LISTENS:
        with check("notifications, one's own and another's"):
            one, two = await connect(), await connect()
            heard = asyncio.Queue()
            await one.add_listener("t_asyncpg", lambda _, pid, channel, payload: heard.put_nowait((pid, channel, payload)))
            await one.execute("SELECT pg_notify('t_asyncpg', $1)", "own")
            equal(heard.get_nowait(), (one.get_server_pid(), "t_asyncpg", "own"))
            async with two.transaction():
                await two.execute("NOTIFY t_asyncpg, 'other'")
            pid, channel, payload = await asyncio.wait_for(heard.get(), 30)
            equal((pid == one.get_server_pid(), channel, payload), (False, "t_asyncpg", "other"))
            await one.reset()
            await one.execute("NOTIFY t_asyncpg, 'nobody'")
            equal(await one.fetchval("SELECT count(*) FROM pg_listening_channels()"), 0)
            equal(heard.empty(), True)
            await one.close()
            await two.close()

    with check("wrong password"):
        try:
            await connect(OWN | {"password": "wrong"})
            raise AssertionError("it was let in")
        except asyncpg.InvalidPasswordError:
            pass
    await admin.close()


asyncio.run(main())
finish()

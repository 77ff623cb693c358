// postgres.js: statement names of its own making, pipelining, Flush.

import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { text } from 'node:stream/consumers'
import postgres from 'postgres'
import { ADMIN, HOST, LOGINS, OWN, PORT, TENANT, TLS, check, equal, failure, finish, range, running, waitUntil } from './kit.mjs'

function open(login = OWN, tls = 'plain', more = {}) {
  const { user: username, password, database, ...connection } = login
  return postgres({ host: HOST, port: PORT, username, password, database, ssl: TLS[tls], max: 1, onnotice: () => {}, connection, ...more })
}

const admin = postgres({ ...ADMIN, username: ADMIN.user, max: 1 })

for (const tls of Object.keys(TLS)) {
  for (const [name, login] of Object.entries(LOGINS)) {
    await check(`${tls}: connect: ${name}`, async () => {
      const sql = open(login, tls)
      const [row] = await sql`SELECT session_user AS u, current_schema() AS s, count(*) FROM bookings WHERE false`
      equal(row, { u: TENANT, s: TENANT, count: '0' })
      await sql.end()
    })
  }
}

await check('startup parameters', async () => {
  const sql = open(OWN, 'plain', { connection: { application_name: 'startup', 'some.var': 'x', statement_timeout: 5000, search_path: TENANT } })
  equal((await sql`SELECT current_setting('some.var') AS v`)[0].v, 'x')
  equal((await sql`SHOW application_name`)[0].application_name, 'startup')
  equal((await sql`SHOW statement_timeout`)[0].statement_timeout, '5s')
  await sql.end()
})

for (const tls of ['plain', 'verify-full']) {
  const sql = open(OWN, tls)
  await sql.unsafe('DROP TABLE IF EXISTS t_pgjs; CREATE TABLE t_pgjs (id int PRIMARY KEY, t text, d jsonb)')

  await check(`${tls}: parameters`, async () => {
    const t = "quote ' and ü"
    const [row] = await sql`INSERT INTO t_pgjs ${sql({ id: 1, t, d: sql.json({ a: [1, null] }) })} RETURNING t, d`
    equal(row, { t, d: { a: [1, null] } })
    equal((await sql`SELECT ${[1, 2]}::int[] AS l`)[0].l, [1, 2])
  })

  await check(`${tls}: COPY in and out`, async () => {
    const lines = range(2000, 22000).map((n) => `${n}\tline\n`)
    await pipeline(Readable.from(lines), await sql`COPY t_pgjs (id, t) FROM STDIN`.writable())
    // Not more: beyond one buffer this driver forgets to go on reading, of a server too.
    const out = await sql`COPY (SELECT id, t FROM t_pgjs WHERE id >= 21000 ORDER BY id) TO STDOUT`.readable()
    equal((await text(out)) === lines.slice(19000).join(''), true)
  })

  await check(`${tls}: a transaction that rolls back`, async () => {
    const error = await failure(sql.begin(async (sql) => {
      await sql`DELETE FROM t_pgjs`
      await sql.savepoint((sql) => sql`SELECT 1/0`).catch(() => {})
      equal((await sql`SELECT count(*)::int AS n FROM t_pgjs`)[0].n, 0)
      throw new Error('ours')
    }))
    equal(error.message, 'ours')
    equal((await sql`SELECT count(*)::int AS n FROM t_pgjs`)[0].n, 20001)
  })

  await check(`${tls}: an error`, async () => {
    const error = await failure(sql`INSERT INTO t_pgjs (id) VALUES (${1})`)
    equal([error.code, error.constraint_name], ['23505', 't_pgjs_pkey'])
    equal((await sql`SELECT 1 AS n`)[0].n, 1)
    equal((await failure(sql.unsafe('SELECT nothing'))).code, '42703')
    equal((await sql`SELECT 1 AS n`)[0].n, 1)
  })

  await check(`${tls}: cancel`, async () => {
    const query = sql`SELECT pg_sleep(60), ${1}::int /* cancel_pgjs */`.execute()
    const failed = failure(query)
    await waitUntil('the query runs', async () => (await admin.unsafe(running('cancel_pgjs')))[0].n)
    await query.cancel()
    equal((await failed).code, '57014')
    for (const n of range(0, 50)) equal((await sql`SELECT ${n}::int AS n`)[0].n, n)
  })

  await check(`${tls}: prepared statements used many times`, async () => {
    for (const n of range(0, 300)) equal((await sql`SELECT ${n}::int + 1 AS n`)[0].n, n + 1)
    for (const n of range(0, 250)) equal((await sql.unsafe(`SELECT $1::int + ${n} AS n`, [1], { prepare: true }))[0].n, n + 1)
  })

  await check(`${tls}: pipelined queries`, async () => {
    const results = await Promise.all(range(0, 200).map((n) => sql`SELECT ${n}::int AS n`))
    equal(results.map((rows) => rows[0].n), range(0, 200))
  })

  await check(`${tls}: cursor`, async () => {
    let total = 0
    for await (const rows of sql`SELECT generate_series(1, 5000)::int AS n`.cursor(100)) for (const row of rows) total += row.n
    equal(total, 12502500)
  })
  await sql.end()
}

await check('pool: 60 transactions share 4 connections', async () => {
  const sql = open(OWN, 'plain', { max: 4 })
  await sql.unsafe('CREATE TABLE IF NOT EXISTS t_pgjs_pool (n int); TRUNCATE t_pgjs_pool')
  await Promise.all(range(0, 60).map((n) => sql.begin(async (sql) => {
    await sql`INSERT INTO t_pgjs_pool VALUES (${n})`
    if (n % 2) throw new Error('rolled back')
  }).catch((error) => equal(error.message, 'rolled back'))))
  equal((await sql`SELECT count(*)::int AS n, sum(n)::int AS s FROM t_pgjs_pool`)[0], { n: 30, s: 870 })
  await sql.end()
})

await check('wrong password', async () => {
  const sql = open({ ...OWN, password: 'wrong' })
  equal((await failure(sql`SELECT 1`)).code, '28P01')
})
await admin.end()
finish()

// node-postgres.

import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { text } from 'node:stream/consumers'
import pg from 'pg'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import { ADMIN, HOST, LOGINS, OWN, PORT, TENANT, TLS, check, equal, failure, finish, range, running, waitUntil } from './kit.mjs'

async function connect(login = OWN, tls = 'plain', more = {}) {
  const client = new pg.Client({ host: HOST, port: PORT, ssl: TLS[tls], ...login, ...more })
  await client.connect()
  return client
}

const admin = new pg.Client(ADMIN)
await admin.connect()

for (const tls of Object.keys(TLS)) {
  for (const [name, login] of Object.entries(LOGINS)) {
    await check(`${tls}: connect: ${name}`, async () => {
      const client = await connect(login, tls)
      const { rows } = await client.query('SELECT session_user AS u, current_schema() AS s, count(*) FROM bookings WHERE false')
      equal(rows[0], { u: TENANT, s: TENANT, count: '0' })
      equal(Boolean(client.connection.stream.encrypted), tls !== 'plain')
      await client.end()
    })
  }
}

await check('startup parameters', async () => {
  const client = await connect(OWN, 'plain', {
    application_name: 'startup', statement_timeout: 54321, lock_timeout: 4321, idle_in_transaction_session_timeout: 65432,
    options: '-c work_mem=3MB',
  })
  const show = async (name) => (await client.query(`SHOW ${name}`)).rows[0][name]
  for (const [name, value] of [['application_name', 'startup'], ['statement_timeout', '54321ms'], ['lock_timeout', '4321ms'],
    ['idle_in_transaction_session_timeout', '65432ms'], ['work_mem', '3MB']]) equal(await show(name), value)
  await client.end()
})

await check('statement_timeout', async () => {
  const client = await connect(OWN, 'plain', { statement_timeout: 100 })
  equal((await failure(client.query('SELECT pg_sleep(60)'))).code, '57014')
  equal((await client.query('SELECT 1 AS n')).rows[0].n, 1)
  await client.end()
})

for (const tls of ['plain', 'verify-full']) {
  const client = await connect(OWN, tls)
  await client.query('DROP TABLE IF EXISTS t_node; CREATE TABLE t_node (id int PRIMARY KEY, t text, d jsonb)')

  await check(`${tls}: parameters`, async () => {
    const { rows } = await client.query('INSERT INTO t_node VALUES ($1, $2, $3) RETURNING t, d', [1, "quote ' and ü", { a: [1, null] }])
    equal(rows[0], { t: "quote ' and ü", d: { a: [1, null] } })
    equal((await client.query('SELECT $1::int[] AS l', [[1, 2]])).rows[0].l, [1, 2])
  })

  await check(`${tls}: COPY in and out`, async () => {
    const lines = range(2000, 22000).map((n) => `${n}\tline\n`)
    await pipeline(Readable.from(lines), client.query(copyFrom('COPY t_node (id, t) FROM STDIN')))
    const out = client.query(copyTo('COPY (SELECT id, t FROM t_node WHERE id >= 2000 ORDER BY id) TO STDOUT'))
    equal((await text(out)) === lines.join(''), true)
  })

  await check(`${tls}: a transaction that rolls back`, async () => {
    await client.query('BEGIN')
    await client.query('DELETE FROM t_node')
    await client.query('ROLLBACK')
    equal((await client.query('SELECT count(*)::int AS n FROM t_node')).rows[0].n, 20001)
  })

  await check(`${tls}: an error`, async () => {
    for (const query of [['INSERT INTO t_node VALUES (1)'], ['INSERT INTO t_node VALUES ($1)', [1]]]) {
      const error = await failure(client.query(...query))
      equal([error.code, error.constraint], ['23505', 't_node_pkey'])
      equal((await client.query('SELECT 1 AS n')).rows[0].n, 1)
    }
  })

  await check(`${tls}: cancel`, async () => {
    const query = new pg.Query('SELECT pg_sleep(60) /* cancel_node */')
    const done = new Promise((resolve) => {
      query.on('error', resolve)
      query.on('end', () => resolve(new Error('it slept to its end')))
    })
    client.query(query)
    await waitUntil('the query runs', async () => (await admin.query(running('cancel_node'))).rows[0].n)
    new pg.Client({ host: HOST, port: PORT, ssl: TLS[tls], ...OWN }).cancel(client, query)
    equal((await done).code, '57014')
    for (const n of range(0, 50)) equal((await client.query('SELECT $1::int AS n', [n])).rows[0].n, n)
  })

  await check(`${tls}: prepared statements used many times`, async () => {
    for (const n of range(0, 300)) {
      equal((await client.query({ name: 'plus', text: 'SELECT $1::int + 1 AS n', values: [n] })).rows[0].n, n + 1)
    }
    for (const n of range(0, 250)) {
      equal((await client.query({ name: `plus ${n}`, text: `SELECT $1::int + ${n} AS n`, values: [1] })).rows[0].n, n + 1)
    }
  })

  await check(`${tls}: queries without waiting`, async () => {
    const results = await Promise.all(range(0, 200).map((n) => client.query('SELECT $1::int AS n', [n])))
    equal(results.map((result) => result.rows[0].n), range(0, 200))
  })
  await client.end()
}

await check('pool: 60 transactions share 4 connections', async () => {
  const pool = new pg.Pool({ host: HOST, port: PORT, ...OWN, max: 4 })
  await pool.query('CREATE TABLE IF NOT EXISTS t_node_pool (n int); TRUNCATE t_node_pool')
  await Promise.all(range(0, 60).map(async (n) => {
    const client = await pool.connect()
    try {
      await client.query('BEGIN')
      await client.query('INSERT INTO t_node_pool VALUES ($1)', [n])
      await client.query(n % 2 ? 'ROLLBACK' : 'COMMIT')
    } finally {
      client.release()
    }
  }))
  equal((await pool.query('SELECT count(*)::int AS n, sum(n)::int AS s FROM t_node_pool')).rows[0], { n: 30, s: 870 })
  await pool.end()
})

await check('wrong password', async () => {
  equal((await failure(connect({ ...OWN, password: 'wrong' }))).code, '28P01')
})
await admin.end()
finish()

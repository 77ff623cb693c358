// For the Node scripts: where to connect, and `ok`, `FAIL` lines that ../run reads.

import { readFileSync } from 'node:fs'

const told = (name) => process.env[`PGUSHER_TEST_${name}`]

export const HOST = told('HOST'), PORT = Number(told('PORT')), TENANT = told('TENANT')
export const CA = readFileSync(told('CA'), 'utf8')
export const OWN = { user: TENANT, password: told('TENANT_PASSWORD'), database: TENANT }
export const ADMIN = {
  host: '127.0.0.1', port: Number(told('ADMIN_PORT')), user: 'postgres', password: told('ADMIN_PASSWORD'),
  database: told('ADMIN_DATABASE'),
}
const app = told('APP_USER'), password = told('APP_PASSWORD')

// Every way to say who the tenant is.
export const LOGINS = {
  'own login': OWN,
  'app.tenant': { user: `${app}.${TENANT}`, password, database: 'postgres' },
  'app@tenant': { user: `${app}@${TENANT}`, password, database: 'tenants' },
  options: { user: app, password, database: 'postgres', options: `-c pgusher.tenant=${TENANT}` },
  database: { user: app, password, database: TENANT },
  application_name: { user: app, password, database: 'postgres', application_name: `${TENANT}/worker` },
}

export const TLS = {
  plain: false,
  require: { rejectUnauthorized: false },
  'verify-full': { ca: CA, servername: 'localhost' },
}

let failed = false

export async function check(name, work) {
  try {
    await work()
    console.log(`ok\t${name}`)
  } catch (error) {
    failed = true
    const where = /(\w+\.mjs:\d+)/.exec(error.stack?.split('\n').slice(1).filter((line) => !line.includes('kit.mjs')).join('\n') ?? '')
    console.log(`FAIL\t${name}\t${String(error.message || error.code || error).replace(/\s+/g, ' ')} (${where?.[1] ?? ''})`)
  }
}

export function equal(found, expected) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)]
  if (a !== b) throw new Error(`found ${a}, expected ${b}`)
}

// What the promise is rejected with.
export async function failure(promise) {
  let value
  try {
    value = await promise
  } catch (error) {
    return error
  }
  throw new Error(`no error, but ${JSON.stringify(value)}`)
}

// Asks the shard itself, not the proxy: is a statement with this mark being executed?
export const running = (mark) =>
  `SELECT count(*)::int AS n FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE '%${mark}%'`

export async function waitUntil(what, condition) {
  const deadline = Date.now() + 30000
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`waited 30 s in vain: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

export const range = (from, to) => Array.from({ length: to - from }, (_, i) => from + i)

export function finish() {
  process.exit(failed ? 1 : 0)
}

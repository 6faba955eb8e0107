// Everything in the language that has an identity or a memory, kept alive over many rounds and checked in each: what
// a thread must not lose when it is moved, imaged and thawed between two instructions.
//
//   identity.js [ROUNDS]       default 150
//
// Prints a line a round, then OK and a checksum. Times and random numbers are checked, but never printed, so the
// output is the same in every run.

'use strict';

const rounds = Number((globalThis.scriptArgs ?? process.argv.slice(2))[0] ?? 150);

let checks = 0;
function check(truth, what) {
  checks++;
  if (!truth) throw new Error(`${what} (check ${checks})`);
}
function same(found, expected, what) {
  check(Object.is(found, expected), `${what}: ${String(found)} instead of ${String(expected)}`);
}

let checksum = 0x811c9dc5;
function note(text) {
  for (let i = 0; i < text.length; i++) {
    checksum = Math.imul(checksum ^ text.charCodeAt(i), 0x01000193) >>> 0;
  }
}
const hex = number => number.toString(16).padStart(8, '0');

// The script's own random numbers, where the output depends on them.
let state = 12345;
function below(n) {
  state = (Math.imul(state, 1103515245) + 12345) >>> 0;
  return (state >>> 8) % n;
}

// ---- Symbols: equal only to themselves, also those made rounds ago; Symbol.for is a registry by name.

const oldSymbols = [];
const symbolValues = {};
const registered = Symbol.for('peregrine.first');
function symbols(round) {
  const made = Array.from({ length: 50 }, (_, i) => Symbol(`s${i % 7}`));
  made.forEach((symbol, i) => (symbolValues[symbol] = (round - 1) * 50 + i));
  oldSymbols.push(...made);
  same(new Set(oldSymbols).size, oldSymbols.length, 'symbols are distinct');
  const keys = Object.getOwnPropertySymbols(symbolValues);
  same(keys.length, oldSymbols.length, 'as many symbol keys as symbols');
  for (let i = 0; i < 100; i++) {
    const at = below(oldSymbols.length);
    same(symbolValues[oldSymbols[at]], at, 'a symbol finds its property');
    same(keys[at], oldSymbols[at], 'symbol keys keep their order');
    same(oldSymbols[at].description, `s${(at % 50) % 7}`, 'a symbol keeps its description');
  }
  same(Symbol.for('peregrine.first'), registered, 'Symbol.for gives the registered symbol');
  same(Symbol.for(`peregrine.${round - 1}`), registeredBefore, 'Symbol.for gives the symbol of the round before');
  registeredBefore = Symbol.for(`peregrine.${round}`);
  same(Symbol.keyFor(registeredBefore), `peregrine.${round}`, 'a registered symbol knows its key');
  same(Symbol.keyFor(made[0]), undefined, 'other symbols have none');
  check(Symbol('peregrine.first') !== registered, 'a new symbol is not the registered one');
  same([][Symbol.iterator], Array.prototype.values, 'well-known symbols name the same methods');
  note(String(made[3]) + keys.length);
}
let registeredBefore = Symbol.for('peregrine.0');

// ---- Maps and Sets: keys by identity, order of insertion; weak ones too.

const people = [];
const byPerson = new Map();
const secrets = new WeakMap();
const known = new WeakSet();
const seen = new Set([NaN, -0, 'x']);
let oldest;
function collections(round) {
  for (let i = 0; i < 20; i++) {
    const person = { name: `p${round}-${i}`, round };
    people.push(person);
    byPerson.set(person, people.length);
    secrets.set(person, { of: person, number: people.length });
    known.add(person);
  }
  oldest ??= new WeakRef(people[0]);
  same(oldest.deref(), people[0], 'a weak reference reaches what is alive');
  for (let i = 0; i < 60; i++) {
    const at = below(people.length);
    const person = people[at];
    same(byPerson.get(person), at + 1, 'a map finds an object');
    same(secrets.get(person).of, person, 'a weak map finds an object, and it the way back');
    check(known.has(person) && !known.has({ ...person }), 'a weak set knows an object from its copy');
    same(byPerson.get({ ...person }), undefined, 'a copy is another key');
  }
  // Deleting and adding again moves to the end.
  const first = byPerson.keys().next().value;
  const number = byPerson.get(first);
  byPerson.delete(first);
  byPerson.set(first, number);
  same([...byPerson.keys()].at(-1), first, 'a key added again is the last');
  same(byPerson.size, people.length, 'nothing is lost');
  check(seen.has(NaN) && seen.has(0) && seen.has('x'), 'a set finds NaN and zero');
  const groups = Object.groupBy ? Object.groupBy([1, 2, 3], n => (n % 2 ? 'odd' : 'even')).odd.length : 2;
  same(groups, 2, 'groups');
  // An iterator survives changes of its map.
  const map = new Map([['a', 1], ['b', 2], ['c', 3]]);
  const met = [];
  for (const [key] of map) {
    met.push(key);
    if (key === 'a') map.delete('b');
    if (key === 'c' && met.length < 4) map.set('d', 4);
  }
  same(met.join(''), 'acd', 'an iterator sees what is deleted and added');
  note(met.join('') + byPerson.size);
}

// ---- Generators: one runs over all rounds, and owns its locals.

function* endless() {
  const history = [];
  let sum = 0;
  try {
    while (true) {
      const given = yield { sum, length: history.length };
      history.push(given);
      sum += given;
    }
  } finally {
    note(`closed after ${history.length}`);
  }
}
const accumulator = endless();
accumulator.next();
let expectedSum = 0;
let expectedLength = 0;
function* walk(tree) {
  if (!tree) return 0;
  const left = yield* walk(tree.left);
  yield tree.value;
  const right = yield* walk(tree.right);
  return left + right + 1;
}
function insert(tree, value) {
  if (!tree) return { value };
  return value < tree.value
    ? { ...tree, left: insert(tree.left, value) }
    : { ...tree, right: insert(tree.right, value) };
}
function generators(round) {
  for (let i = 0; i < 30; i++) {
    const given = below(1000);
    expectedSum += given;
    expectedLength++;
    const { value } = accumulator.next(given);
    same(value.sum, expectedSum, 'a generator keeps its sum');
    same(value.length, expectedLength, 'a generator keeps its history');
  }
  let tree;
  const values = Array.from({ length: 40 }, () => below(10000));
  for (const value of values) tree = insert(tree, value);
  same([...walk(tree)].join(), values.sort((a, b) => a - b).join(), 'a recursive generator walks in order');

  const steps = [];
  function* guarded() {
    try {
      steps.push(yield 1);
    } catch (error) {
      steps.push(`caught ${error}`);
      yield 2;
    } finally {
      steps.push('finally');
      yield 3;
    }
  }
  const thrown = guarded();
  thrown.next();
  same(thrown.throw('up').value, 2, 'a generator catches what is thrown into it');
  same(thrown.return('early').value, 3, 'return runs the finally block, which may yield');
  const end = thrown.next();
  check(end.done && end.value === 'early', 'then the generator returns');
  note(steps.join() + round);
}

// ---- Closures, classes, errors, try and finally.

const counters = [];
function makeCounter(start) {
  let count = start;
  return { up: () => ++count, get: () => count };
}
class Account {
  static #opened = 0;
  #balance = 0;
  static get opened() { return Account.#opened; }
  constructor(owner) { this.owner = owner; Account.#opened++; }
  deposit(amount) { this.#balance += amount; return this; }
  get balance() { return this.#balance; }
  static is(value) { return #balance in value; }
}
class Saving extends Account {
  get balance() { return super.balance * 2; }
}
class Refused extends Error {
  constructor(amount, options) { super(`refused ${amount}`, options); this.name = 'Refused'; this.amount = amount; }
}
const template = strings => strings;
const literal = () => template`one ${1} two`;
const literalStrings = literal();
function closures(round) {
  counters.push(makeCounter(round));
  counters.forEach((counter, i) => same(counter.up(), i + 1 + round - i, 'a closure counts on its own'));
  same(new Set(counters.map(counter => counter.up)).size, counters.length, 'each has its own functions');
  same(literal(), literalStrings, 'a template object is made once for its place');

  const account = new Saving('a').deposit(round).deposit(5);
  same(account.balance, (round + 5) * 2, 'private fields and super');
  same(Account.opened, round, 'a private static counts');
  check(Account.is(account) && !Account.is({}), 'private names are known by identity');

  const order = [];
  function leave(way) {
    outer: for (const i of [1, 2, 3]) {
      try {
        order.push(i);
        if (way === 'continue') continue outer;
        if (way === 'break') break outer;
        if (way === 'throw') throw new Refused(i, { cause: order });
        if (way === 'return') return 'try';
      } catch (error) {
        check(error instanceof Refused && error instanceof Error && error.cause === order, 'an error keeps its class');
        order.push(error.message);
        return 'catch';
      } finally {
        order.push('f');
        if (way === 'return') return 'finally';
      }
    }
    return 'end';
  }
  const left = ['continue', 'break', 'throw', 'return'].map(leave).join();
  same(left, 'end,end,catch,finally', 'finally runs, and its return wins');
  same(order.join(''), '1f2f3f1f1refused 1f1f', 'in this order');

  const log = [];
  const proxy = new Proxy({ x: 1 }, {
    get: (target, key, receiver) => (log.push(`get ${String(key)}`), Reflect.get(target, key, receiver)),
    has: (target, key) => (log.push(`has ${key}`), key in target),
    deleteProperty: (target, key) => (log.push(`delete ${key}`), Reflect.deleteProperty(target, key)),
  });
  check(proxy.x === 1 && 'x' in proxy && delete proxy.x && !('x' in proxy), 'a proxy does as its target');
  note(order.join('') + log.join() + left);
}

// ---- Time and random numbers: never the same twice, and never backwards.

let lastDate = Date.now();
let lastNow = performance.now();
const randoms = new Set();
function timeAndRandom() {
  for (let i = 0; i < 20; i++) {
    const now = performance.now();
    check(now >= lastNow, `the monotone clock went from ${lastNow} to ${now}`);
    lastNow = now;
    // The wall clock may be set; by more than a second, something is wrong.
    const date = Date.now();
    check(date >= lastDate - 1000, `the date went from ${lastDate} to ${date}`);
    lastDate = date;
    const random = Math.random();
    check(random >= 0 && random < 1, `a random number ${random}`);
    check(!randoms.has(random), `the random number ${random} came twice`);
    randoms.add(random);
  }
  check(Math.abs(new Date().getTime() - Date.now()) < 10_000, 'a new date is now');
  const leap = new Date(Date.UTC(2024, 1, 28 + 1));
  same(leap.toISOString(), '2024-02-29T00:00:00.000Z', 'dates calculate');
  leap.setUTCFullYear(2025);
  same(JSON.stringify(leap), '"2025-03-01T00:00:00.000Z"', 'dates normalise');
  same(new Date(NaN).getTime(), NaN, 'there are invalid dates');
  note(leap.toISOString());
}

// ---- Strings and regular expressions; one expression with its own position lives over all rounds.

let book = '';
const words = /(?<word>\p{L}+)(?<mark>[.,!]?)/gu;
const sticky = /(\d+);/y;
let ledger = '';
function strings(round) {
  const before = book.length;
  for (let i = 0; i < 40; i++) book += String.fromCharCode(97 + below(26)) + (i % 9 === 8 ? 'é, ' : '');
  book += `round ${round}. 😀 `;
  check(book.length > before && book.endsWith('. 😀 '), 'a string grows');
  same([...'a😀b'].length, 3, 'strings iterate by code point');
  same('naïve'.normalize('NFD').length, 6, 'normal forms');
  same('ǅ'.toLowerCase() + 'ß'.toUpperCase(), 'ǆSS', 'case by Unicode');
  same('x'.padEnd(3, 'ab') + 'ab'.repeat(2) + ' y '.trim() + 'a-b-c'.replaceAll('-', '+'), 'xabababya+b+c', 'strings');

  let count = 0;
  let letters = 0;
  for (const { groups } of book.slice(before).matchAll(words)) {
    count++;
    letters += groups.word.length;
  }
  words.lastIndex = 0;
  same('Hello, World'.replace(words, (all, word, mark) => word.toUpperCase() + mark), 'HELLO, WORLD', 'replace calls');

  ledger += `${round * 7};`;
  const match = sticky.exec(ledger);
  same(Number(match[1]), round * 7, 'a sticky expression goes on where it was');
  same(sticky.lastIndex, ledger.length, 'and stands at the end');
  same('2026-07-04'.replace(/(?<y>\d+)-(?<m>\d+)-(?<d>\d+)/, '$<d>/$<m>/$<y>'), '04/07/2026', 'named groups');
  same('price: $42, €7'.match(/(?<=€)\d+/)[0], '7', 'lookbehind');
  same(/^(?:a|ab)(?:c|bcd)(d*)$/.exec('abcd')[1], '', 'backtracking');
  note(`${count} ${letters} ${book.length}`);
  note(book.slice(-30));
}

// ---- JSON, sorting, typed arrays, big integers.

const buffer = new ArrayBuffer(1024);
const doubles = new Float64Array(buffer, 0, 64);
const bytes = new Uint8Array(buffer);
const view = new DataView(buffer, 512);
let fibonacci = [0n, 1n];
function data(round) {
  const value = {
    round, list: [1, [2, [3, null]], 'a"\n\u2028'], nested: { deep: { deeper: round / 3 } }, none: undefined, yes: true,
    toJSON() { return { ...this, toJSON: undefined, stamped: 'yes' }; },
  };
  const text = JSON.stringify(value, (key, v) => (key === 'yes' ? 'replaced' : v));
  const back = JSON.parse(text, (key, v) => (key === 'deeper' ? v * 3 : v));
  same(Math.round(back.nested.deep.deeper * 1e6) / 1e6, round, 'a reviver revives');
  same(back.stamped + back.yes + ('none' in back), 'yesreplacedfalse', 'a replacer replaces');
  note(text + JSON.stringify({ b: [1, { c: 2 }] }, null, 2));

  const records = Array.from({ length: 200 }, (_, index) => ({ key: below(20), index }));
  const sorted = records.toSorted ? records.toSorted((a, b) => a.key - b.key) : [...records].sort((a, b) => a.key - b.key);
  for (let i = 1; i < sorted.length; i++) {
    const [a, b] = [sorted[i - 1], sorted[i]];
    check(a.key < b.key || (a.key === b.key && a.index < b.index), 'sorting is stable');
    same(records[b.index], b, 'and keeps the objects');
  }
  same([10, 9, 1].sort().join(), '1,10,9', 'the default order is that of strings');
  note(sorted.map(record => record.index).join());

  doubles[round % 64] += round + 0.5;
  const at = (round * 4) % 500;
  view.setInt32(at, -round);
  same(view.getInt32(at), -round, 'a view reads what it wrote');
  same(bytes[512 + at + 3], -round & 255, 'big-endian if not said otherwise');
  const sum = doubles.reduce((total, number) => total + number, 0);
  same(sum, (round * (round + 1)) / 2 + round / 2, 'a typed array keeps its numbers');
  const copy = Uint8Array.from(bytes.subarray(0, 512)).sort();
  check(copy.every((byte, i) => i === 0 || copy[i - 1] <= byte), 'typed arrays sort');
  same(new Uint8ClampedArray([300, -5, 1.5]).join(), '255,0,2', 'clamped arrays clamp');
  note(bytes.join());

  for (let i = 0; i < 10; i++) fibonacci = [fibonacci[1], fibonacci[0] + fibonacci[1]];
  let power = 1n;
  for (let i = 0, base = 3n; i < 64; i++) {
    if ((BigInt(round) >> BigInt(i)) & 1n) power = (power * base) % 1_000_000_007n;
    base = (base * base) % 1_000_000_007n;
  }
  same(BigInt.asIntN(8, 255n), -1n, 'big integers wrap when asked');
  note(`${fibonacci[0]} ${power} ${0.1 + 0.2} ${(1e21 + round).toString(36)} ${(round / 7).toFixed(10)}`);
}

// ---- Promises and async functions: the order of their turns, and one that stays open from round to round.

let opened = Promise.withResolvers ? Promise.withResolvers() : deferred();
function deferred() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  return parts;
}
async function* ticker(n) {
  try {
    for (let i = 0; i < n; i++) yield await Promise.resolve(i);
  } finally {
    await null;
  }
}
async function promises(round) {
  const order = [];
  const before = opened;
  const waiting = before.promise.then(value => order.push(`open ${value}`));
  setTimeout(() => order.push('timer'), 0);
  queueMicrotask(() => order.push('microtask'));
  Promise.resolve().then(() => order.push('then')).finally(() => order.push('finally'));
  (async () => {
    order.push('sync');
    await null;
    order.push('awaited');
    try {
      await Promise.reject(new Refused(round));
    } catch (error) {
      order.push(error.message);
    }
  })();
  order.push('end of turn');
  before.resolve(round);
  await waiting;
  opened = deferred();

  const all = await Promise.all([1, Promise.resolve(2), { then: resolve => resolve(3) }]);
  const settled = await Promise.allSettled([Promise.reject(new Error('no')), 4]);
  const any = await Promise.any([Promise.reject(1), new Promise(resolve => setTimeout(resolve, 1, 'any'))]);
  const race = await Promise.race([new Promise(() => {}), Promise.resolve('race')]);
  const ticks = [];
  for await (const tick of ticker(5)) {
    ticks.push(tick);
    if (tick === 3) break;
  }
  await new Promise(resolve => setTimeout(resolve, 1));
  same(order.filter(what => what === 'timer').length, 1, 'a timer runs once');
  note(order.join() + all.join() + settled.map(s => s.status).join() + any + race + ticks.join());
}

async function main() {
  for (let round = 1; round <= rounds; round++) {
    symbols(round);
    collections(round);
    generators(round);
    closures(round);
    timeAndRandom();
    strings(round);
    data(round);
    await promises(round);
    console.log(`round ${round}: ${checks} checks, ${hex(checksum)}`);
  }
  accumulator.return();
  console.log(`OK ${hex(checksum)}`);
}

main();

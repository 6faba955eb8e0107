// Builds and drops large structures of small objects: an allocation every few instructions, and a garbage collector
// at work all the time.
//
//   two.js [ROUNDS]            default 8
//
// A round grows and folds binary trees, counts words in a generated text, keeps a linked list used as a queue, and
// multiplies matrices of arrays. What a round leaves behind for the next is kept in a ring of a few rounds, so the
// live heap neither stays small nor grows for ever.

const rounds = Number((globalThis.scriptArgs ?? process.argv.slice(2))[0] ?? 8);

let state = 2463534242;
function below(n) {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % n;
}

let checksum = 0;
const mix = number => (checksum = (Math.imul(checksum, 31) + number) >>> 0);

// ---- Trees

const grow = depth => (depth === 0 ? { leaf: below(100) } : { left: grow(depth - 1), right: grow(depth - 1) });
const fold = tree => ('leaf' in tree ? tree.leaf : (fold(tree.left) * 3 + fold(tree.right)) % 1_000_003);
const mirror = tree => ('leaf' in tree ? { ...tree } : { left: mirror(tree.right), right: mirror(tree.left) });

function trees(depth) {
  const tree = grow(depth);
  const sum = fold(tree);
  if (fold(mirror(mirror(tree))) !== sum) throw new Error('a tree mirrored twice is another');
  mix(sum);
  return tree;
}

// ---- Words

const syllables = ['ka', 'to', 'mi', 'ru', 'shi', 'no', 'pe', 'la', 'gri', 'ne'];
function words(length) {
  let text = '';
  for (let i = 0; i < length; i++) {
    const parts = Array.from({ length: 1 + below(3) }, () => syllables[below(syllables.length)]);
    text += `${parts.join('')}${below(8) === 0 ? '. ' : ' '}`;
  }
  const counts = new Map();
  for (const word of text.split(/\W+/)) {
    if (word !== '') counts.set(word, (counts.get(word) ?? 0) + 1);
  }
  const ranking = [...counts].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1));
  for (const [word, count] of ranking.slice(0, 50)) mix(count * word.length);
  return counts;
}

// ---- A queue

class Queue {
  #head = null;
  #tail = null;
  size = 0;
  push(value) {
    const node = { value, next: null };
    if (this.#tail) this.#tail.next = node;
    else this.#head = node;
    this.#tail = node;
    this.size++;
  }
  pop() {
    const { value, next } = this.#head;
    this.#head = next;
    if (!next) this.#tail = null;
    this.size--;
    return value;
  }
}

const queue = new Queue();
let pushed = 0;
let popped = 0;
function churn(times) {
  for (let i = 0; i < times; i++) {
    if (queue.size === 0 || below(100) < 52) {
      queue.push({ number: pushed++, name: `job ${pushed}`, tags: [pushed % 3, pushed % 5] });
    } else {
      const job = queue.pop();
      if (job.number !== popped++) throw new Error(`job ${job.number} came out instead of ${popped - 1}`);
      mix(job.tags[0] + job.name.length);
    }
  }
}

// ---- Matrices

function matrices(n) {
  const make = () => Array.from({ length: n }, () => Array.from({ length: n }, () => below(10)));
  const transpose = m => m[0].map((_, column) => m.map(row => row[column]));
  const times = (a, b) => {
    const columns = transpose(b);
    return a.map(row => columns.map(column => row.reduce((sum, value, i) => sum + value * column[i], 0)));
  };
  const [a, b] = [make(), make()];
  const left = transpose(times(a, b));
  const right = times(transpose(b), transpose(a));
  if (JSON.stringify(left) !== JSON.stringify(right)) throw new Error('the transposed product is another');
  mix(left.flat().reduce((sum, value) => sum + value));
  return left;
}

const ring = [];
for (let round = 1; round <= rounds; round++) {
  const kept = { tree: trees(13), counts: words(6000), product: matrices(24) };
  churn(20000);
  ring.push(kept);
  if (ring.length > 3) {
    const old = ring.shift();
    mix(fold(old.tree) + old.counts.size + old.product.length);
  }
  console.log(`round ${round}: ${queue.size} jobs wait, ${kept.counts.size} words, checksum ${checksum}`);
}
console.log(`done after ${pushed} jobs, checksum ${checksum}`);

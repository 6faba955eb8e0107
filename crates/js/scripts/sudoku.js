// Makes sudoku puzzles with exactly one solution and solves them again: a long computation with a small heap.
//
//   sudoku.js [PUZZLES [CELLS]]        default 12 and 81
//
// A puzzle is a random full grid; of CELLS cells, each is emptied if the solution stays unique without it. The random
// numbers are the script's own, so every run prints the same.

const [puzzles = 12, attempts = 81] = (globalThis.scriptArgs ?? process.argv.slice(2)).map(Number);

// A 32-bit generator (xorshift), and a number below n from it.
let state = 0x9e3779b9;
function below(n) {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % n;
}

function shuffled(items) {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = below(i + 1);
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

const cells = Array.from({ length: 81 }, (_, cell) => cell);
const rowOf = cells.map(cell => Math.floor(cell / 9));
const columnOf = cells.map(cell => cell % 9);
const boxOf = cells.map(cell => Math.floor(rowOf[cell] / 3) * 3 + Math.floor(columnOf[cell] / 3));
const bitCount = Array.from({ length: 512 }, (_, bits) => bits.toString(2).replaceAll('0', '').length);

// Bit d of these says that the digit d + 1 is taken there.
class Grid {
  constructor(digits) {
    this.digits = Uint8Array.from(digits);
    this.rows = new Uint16Array(9);
    this.columns = new Uint16Array(9);
    this.boxes = new Uint16Array(9);
    this.digits.forEach((digit, cell) => digit && this.mark(cell, 1 << (digit - 1)));
    this.steps = 0;
  }

  mark(cell, bit) {
    this.rows[rowOf[cell]] ^= bit;
    this.columns[columnOf[cell]] ^= bit;
    this.boxes[boxOf[cell]] ^= bit;
  }

  free(cell) {
    return ~(this.rows[rowOf[cell]] | this.columns[columnOf[cell]] | this.boxes[boxOf[cell]]) & 511;
  }

  // The empty cell with the fewest possible digits; -1 if none is empty.
  tightest() {
    let best = -1;
    let fewest = 10;
    for (let cell = 0; cell < 81; cell++) {
      if (this.digits[cell] !== 0) continue;
      const count = bitCount[this.free(cell)];
      if (count < fewest) {
        best = cell;
        fewest = count;
        if (count < 2) break;
      }
    }
    return best;
  }

  // Yields each solution, trying digits in the order given.
  *solutions(order) {
    this.steps++;
    const cell = this.tightest();
    if (cell === -1) {
      yield this.digits.join('');
      return;
    }
    const free = this.free(cell);
    for (const digit of order) {
      const bit = 1 << (digit - 1);
      if ((free & bit) === 0) continue;
      this.digits[cell] = digit;
      this.mark(cell, bit);
      yield* this.solutions(order);
      this.mark(cell, bit);
      this.digits[cell] = 0;
    }
  }
}

const rising = [1, 2, 3, 4, 5, 6, 7, 8, 9];

function count(digits, most) {
  let found = 0;
  for (const _ of new Grid(digits).solutions(rising)) {
    if (++found === most) break;
  }
  return found;
}

function make() {
  const full = new Grid(new Array(81).fill(0)).solutions(shuffled(rising)).next().value;
  const digits = Array.from(full, Number);
  // The search always starts alike; which digit is which, and which rows and columns, is chosen here.
  const names = [0, ...shuffled(rising)];
  const order = lines => [0, 1, 2].flatMap(band => shuffled([0, 1, 2]).map(line => lines[band] * 3 + line));
  const [rows, columns] = [order(shuffled([0, 1, 2])), order(shuffled([0, 1, 2]))];
  const puzzle = cells.map(cell => names[digits[rows[rowOf[cell]] * 9 + columns[columnOf[cell]]]]);
  for (const cell of shuffled(cells).slice(0, attempts)) {
    const digit = puzzle[cell];
    puzzle[cell] = 0;
    if (count(puzzle, 2) !== 1) puzzle[cell] = digit;
  }
  return puzzle;
}

function check(solution) {
  const units = [rowOf, columnOf, boxOf];
  const complete = unit => new Set(cells.map(cell => unit[cell] * 10 + Number(solution[cell]))).size === 81;
  if (solution.length !== 81 || solution.includes('0') || !units.every(complete)) {
    throw new Error(`not a solution: ${solution}`);
  }
}

let checksum = 0x811c9dc5;
let steps = 0;
for (let number = 1; number <= puzzles; number++) {
  const puzzle = make();
  const grid = new Grid(puzzle);
  const [solution] = grid.solutions(rising);
  check(solution);
  steps += grid.steps;
  for (const character of puzzle.join('') + solution) {
    checksum = Math.imul(checksum ^ character.charCodeAt(0), 0x01000193) >>> 0;
  }
  const givens = puzzle.filter(digit => digit !== 0).length;
  console.log(`puzzle ${number}: ${givens} givens, ${grid.steps} steps, ${checksum.toString(16).padStart(8, '0')}`);
}
console.log(`${puzzles} puzzles solved in ${steps} steps, checksum ${checksum.toString(16).padStart(8, '0')}`);

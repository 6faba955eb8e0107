// Goroutines that hold 200 bytes each and wait for a message of their own, made in parts: see mod.rs, and memory.rs for what is left.
package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const parts = 4

// The first number of each line that begins with this, together.
func sum(file, name string) float64 {
	text, _ := os.ReadFile(file)
	all := 0.0
	for _, line := range strings.Split(string(text), "\n") {
		if rest := strings.TrimPrefix(strings.TrimSpace(line), name); rest != strings.TrimSpace(line) {
			n, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			all += n
		}
	}
	return all
}

func left() float64 {
	return sum("/proc/meminfo", "MemAvailable:")*1024 + sum("/proc/zoneinfo", "count:")*4096
}

// Until five looks are alike.
func leftAtRest() float64 {
	last, alike := left(), 1
	for i := 0; i < 100 && alike < 5; i++ {
		time.Sleep(20 * time.Millisecond)
		now := left()
		if d := now - last; d < 512<<10 && d > -512<<10 {
			alike++
		} else {
			alike = 1
		}
		last = now
	}
	return last
}

func counted() float64 {
	return (sum("/proc/self/status", "RssAnon:") + sum("/proc/self/status", "VmPTE:")) * 1024
}

func waits(seed uint64, woken chan uint64, done chan uint64) {
	held := make([]byte, 200)
	for i := range held {
		held[i] = byte(seed >> (i % 40))
	}
	n := <-woken
	for _, b := range held {
		n += uint64(b)
	}
	done <- n
}

func main() {
	tasks, _ := strconv.Atoi(os.Args[1])
	points := [][2]float64{{0, -leftAtRest()}}
	countedBefore := counted()
	all := make([]chan uint64, tasks)
	done := make(chan uint64, 1024)
	making := time.Duration(0)
	for p := 0; p < parts; p++ {
		begun := time.Now()
		for i := tasks * p / parts; i < tasks*(p+1)/parts; i++ {
			all[i] = make(chan uint64)
			go waits(uint64(i), all[i], done)
		}
		time.Sleep(time.Millisecond)
		making += time.Since(begun)
		points = append(points, [2]float64{float64(tasks * (p + 1) / parts), -leftAtRest()})
	}
	n := float64(tasks)
	countedEach := (counted() - countedBefore) / n
	each := (points[parts][1] - points[0][1]) / n
	// Least squares.
	x, y, above, below := 0.0, 0.0, 0.0, 0.0
	for _, q := range points {
		x += q[0] / (parts + 1)
		y += q[1] / (parts + 1)
	}
	for _, q := range points {
		above += (q[0] - x) * (q[1] - y)
		below += (q[0] - x) * (q[0] - x)
	}
	begun := time.Now()
	go func() {
		for _, c := range all {
			c <- 1
		}
	}()
	for range all {
		<-done
	}
	woken := n / time.Since(begun).Seconds()
	fmt.Printf("%f\n%f\n%f\n%f\n%f\n", each, above/below, countedEach, n/making.Seconds(), woken)
}

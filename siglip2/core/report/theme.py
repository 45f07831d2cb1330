"""Style sheet and script of the page; in Python, so that no packaging step can lose them."""

CSS = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1b1c1f;--soft:#5b5e66;--line:#e3e3df;
--grid:#ecece8;
--accent:#2457c5;--accent-soft:#b9cbf3;--raw:#9db5e8;--good:#14713f;--warn:#b3261e;
--tag:#efefeb;
--mark:#1b1c1f;--track:#eeeeea}
@media screen and (prefers-color-scheme:dark){:root{--page:#121316;--card:#1a1c20;--ink:#e9eaec;
--soft:#a2a6af;
--line:#2c2f35;--grid:#272a30;--accent:#86aefb;--accent-soft:#34496f;--raw:#45608f;--good:#63d197;
--warn:#ff8a80;--tag:#292c32;--mark:#fff;--track:#292c32}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:1200px;margin:0 auto;padding:48px 32px 80px}
h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;margin:0;font-weight:650}
h2{font-size:21px;line-height:1.3;letter-spacing:-.01em;margin:0 0 4px;font-weight:650}
h3{font-size:13px;margin:24px 0 10px;color:var(--soft);font-weight:600}
p{margin:0}
.subtitle{color:var(--soft);font-size:17px;margin-top:6px;max-width:75ch}
section{margin-top:64px;scroll-margin-top:16px}
.lead{color:var(--soft);max-width:90ch;margin-bottom:18px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-top:28px}
.figures>div,.card,.panel,.scroll,details{background:var(--card);border:1px solid var(--line);
border-radius:10px}
.figures>div{padding:16px 18px;display:flex;flex-direction:column}
.label{color:var(--soft);font-size:13px;line-height:1.4}
.value{font-size:30px;line-height:1.3;font-weight:650;letter-spacing:-.02em}
.figures .bar{margin:6px 0 8px}
.note{color:var(--soft);font-size:13px;line-height:1.4}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px 30px;margin:28px 0 0;
padding:20px 0;border:solid var(--line);border-width:1px 0}
dt{color:var(--soft);font-size:13px}
dd{margin:0;font-weight:500}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin-top:16px;font-size:14px}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:12px}
figure{margin:0}
.panel{padding:14px 14px 8px;min-width:0}
.panel figcaption{display:flex;justify-content:space-between;gap:12px;align-items:baseline;margin:0 4px 8px}
.curve-name{font-weight:600}
.reading{color:var(--accent);font-weight:600;white-space:nowrap;text-align:end}
.reading small{color:var(--soft);font-weight:400;font-size:13px}
.panel svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
.grid{stroke:var(--grid)}
.tick{fill:var(--soft);font-size:11px}
.tick.end{text-anchor:end}
.tick.middle{text-anchor:middle}
polyline{fill:none;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke:var(--raw);stroke-width:1;opacity:.75}
.line{stroke:var(--accent);stroke-width:2}
.dot{fill:var(--accent);stroke:var(--card);stroke-width:1}
.lost{stroke:var(--warn);stroke-width:1.5}
.lost-note{color:var(--warn);font-size:13px;margin:0 4px 4px}
.empty{color:var(--soft);padding:28px 4px}
.cursor{visibility:hidden}
.cursor line{stroke:var(--soft);stroke-dasharray:2 3}
.cursor circle{fill:var(--card);stroke:var(--accent);stroke-width:2}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:7px 12px;text-align:end;white-space:nowrap;font-weight:400}
th:first-child{text-align:start;padding-inline-start:18px;position:sticky;left:0;background:var(--card)}
th:last-child,td:last-child{padding-inline-end:18px}
thead th{color:var(--soft);font-size:13px;border-bottom:1px solid var(--line);white-space:normal;
vertical-align:bottom;line-height:1.3}
.dataset th{font-weight:600;padding-top:16px;white-space:normal}
tbody+tbody .dataset th{border-top:1px solid var(--line)}
.mean>*{border-top:1px solid var(--line);font-weight:600}
.ranked thead th:nth-child(3),td.wide{text-align:start;width:44%;min-width:150px}
.recall .bar{height:4px;margin-top:4px;min-width:72px}
.muted,.mean .muted{color:var(--soft)}
.bar{display:block;position:relative;height:10px;background:var(--track);border-radius:2px}
.bar i{position:absolute;top:0;bottom:0;left:0;border-radius:2px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.front{background:var(--accent)}
.behind{background:var(--accent-soft)}
.bar .chance{background:var(--mark);width:2px;margin-left:-1px;top:-3px;bottom:-3px;
box-shadow:0 0 0 1px var(--card)}
.figures .bar,.score+.bar,.texts .bar{height:4px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:12px}
.card{padding:16px 18px;min-width:0}
.query{display:flex;gap:12px;justify-content:space-between;align-items:baseline;margin-bottom:12px}
.query span:first-child{font-weight:600;min-width:0}
.tag{color:var(--soft);font-weight:400;background:var(--tag);font-size:12px;line-height:1;padding:4px 7px;
border-radius:4px;white-space:nowrap;flex:none}
ol{list-style:none;margin:0;padding:0}
.tiles{display:grid;grid-template-columns:repeat(var(--n),minmax(0,112px));gap:10px}
.frame{display:block;aspect-ratio:1;border-radius:6px;overflow:hidden;background:var(--track)}
img{display:block;width:100%;height:100%;object-fit:contain}
.score{display:flex;justify-content:space-between;font-size:13px;color:var(--soft);margin:5px 0 4px;
line-height:1.3}
.right .frame{box-shadow:0 0 0 2px var(--card),0 0 0 4px var(--good)}
.right .score,.right .score b{color:var(--good);font-weight:650}
.right .front{background:var(--good)}
.beside{display:grid;grid-template-columns:112px minmax(0,1fr);gap:18px;align-items:start}
.texts li+li{margin-top:9px}
.texts .pair{display:flex;justify-content:space-between;gap:14px;font-size:14px;line-height:1.35;
margin-bottom:4px}
.texts .pair span:last-child{white-space:nowrap;color:var(--soft)}
.texts .text{flex:1;min-width:0}
.right .pair,.right .pair span:last-child{color:var(--good);font-weight:650}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(270px,100%),1fr));gap:12px}
.map{padding:12px;display:flex;flex-direction:column}
.map .pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.map figcaption{display:flex;gap:10px;justify-content:space-between;align-items:baseline;margin:10px 2px 6px;
font-weight:600;line-height:1.35}
.map .scale{display:flex;gap:8px;align-items:center;font-size:12px;color:var(--soft);margin:auto 2px 0}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(230px,calc(50% - 6px)),1fr))}
.pairs figcaption{flex-wrap:wrap}
.pairs figcaption span:first-child{flex:1 1 8em}
.boxed{display:block;position:relative;aspect-ratio:var(--ratio);border-radius:6px;overflow:hidden;
background:var(--track)}
.boxed svg{position:absolute;inset:0;width:100%;height:100%}
rect{fill:none;vector-effect:non-scaling-stroke;stroke-width:2.5}
.predicted{stroke:#2f6bff}
.true{stroke:#16181c;stroke-dasharray:6 4}
.halo{stroke:#fff;stroke-width:5;opacity:.85}
.agreement{color:var(--soft);font-size:13px;margin:auto 2px 0}
.right .agreement{color:var(--good);font-weight:650}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;font-size:14px;margin-bottom:14px}
.legend span{display:flex;align-items:center;gap:8px}
.legend svg{width:34px;height:24px}
.truth{color:var(--soft);line-height:1.4}
.truth .label{display:block}
.ramp{flex:1;height:5px;border-radius:2px;print-color-adjust:exact;-webkit-print-color-adjust:exact;
background:linear-gradient(90deg,#000004,#1b0c41,#4a0c6b,#781c6d,#a52c60,#cf4446,#ed6925,#fb9b06,#fcffa4)}
details{margin-top:12px}
summary{cursor:pointer;padding:12px 18px;font-weight:500}
pre{margin:0;padding:14px 18px;overflow-x:auto;border-top:1px solid var(--line);font:13px/1.55 ui-monospace,
SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:normal}
.notes{margin:12px 0 0;padding-inline-start:20px;max-width:85ch}
.notes li+li{margin-top:6px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media (max-width:640px){main{padding:28px 16px 48px}h1{font-size:25px}section{margin-top:48px}
.subtitle{font-size:16px}.figures{grid-template-columns:1fr 1fr}.figures>div{padding:12px 14px}
.value{font-size:25px}
.figures>div:last-child:nth-child(odd){grid-column:1/-1}
.facts{grid-template-columns:1fr 1fr;gap:12px 18px}
th[scope=row]{white-space:normal;max-width:120px}.card{padding:14px}
.beside{grid-template-columns:84px minmax(0,1fr);
gap:14px}.tiles{gap:7px}th,td{padding:7px 9px}th:first-child{padding-inline-start:14px}
.scroll{margin:0 -16px;border-radius:0;border-width:1px 0}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{:root{color-scheme:light}body{background:#fff;font-size:12px}main{padding:0;max-width:none}
nav{display:none}
.card,.panel,.figures>div,tr{break-inside:avoid}
.scroll{overflow:visible}th,td{padding:4px 7px}.recall .bar{min-width:0}.lead{break-after:avoid}
h2,h3{break-after:avoid}.mean{break-before:avoid}section{margin-top:28px}
.panels{grid-template-columns:repeat(3,1fr)}.cards{grid-template-columns:1fr 1fr}
.maps{grid-template-columns:repeat(3,1fr)}}
""".strip()

SCRIPT = """
// Under the pointer, the panel's reading shows that step; without a script it stays at the last value.
document.querySelectorAll('.panel svg').forEach(function (svg) {
  var points = JSON.parse(svg.dataset.points), cursor = svg.querySelector('.cursor');
  var reading = svg.parentNode.querySelector('.reading'), last = reading.innerHTML;
  function move(event) {
    var box = svg.getBoundingClientRect();
    var x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    var near = points.reduce(function (a, b) { return Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a; });
    cursor.firstChild.setAttribute('x1', near[0]);
    cursor.firstChild.setAttribute('x2', near[0]);
    cursor.lastChild.setAttribute('cx', near[0]);
    cursor.lastChild.setAttribute('cy', near[1]);
    cursor.style.visibility = 'visible';
    var where = document.createElement('small');
    where.textContent = svg.parentNode.dataset.unit + ' at ' + near[2].toLocaleString('en');
    reading.textContent = near[3];
    reading.appendChild(where);
  }
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
  svg.addEventListener('pointerleave', function () {
    cursor.style.visibility = 'hidden';
    reading.innerHTML = last;
  });
});
""".strip()
